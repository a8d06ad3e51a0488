"""What `validate` and the tests share: the table of cases, memory layouts, and the allowance for rounding errors.

A new op is added to :data:`~chainzrule_kernels.testing.cases.CASES`; every check then covers it.
"""

from chainzrule_kernels.testing.accuracy import Accuracy, measure
from chainzrule_kernels.testing.cases import CASES, Case, TensorArgument
from chainzrule_kernels.testing.layouts import LAYOUTS, Layout

__all__ = ["CASES", "LAYOUTS", "Accuracy", "Case", "Layout", "TensorArgument", "measure"]

"""``python -m chainzrule_kernels``: see :mod:`chainzrule_kernels.cli`."""

import sys

from chainzrule_kernels.cli import main

sys.exit(main())

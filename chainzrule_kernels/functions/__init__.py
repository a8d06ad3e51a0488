"""The scalar functions ``f`` of this package and their derivatives, in plain PyTorch.

An op never asks which function it computes: it asks a :class:`ScalarFunction` for ``f, f', f'', …`` at ``z``, and,
where the function has learnable coefficients, for the gradient with respect to them. There are two families:
:class:`~chainzrule_kernels.functions.polynomial.Polynomial`, perhaps of ``relu(z)``, and
:class:`~chainzrule_kernels.functions.activations.Activation`. The same two stand in ``csrc/math`` for C++ and CUDA.
"""

from chainzrule_kernels.functions.activations import ACTIVATION_KINDS, SAME_DERIVATIVES_AT_VALUE, Activation
from chainzrule_kernels.functions.base import ScalarFunction, compute_dtype
from chainzrule_kernels.functions.polynomial import MAX_DEGREE, Polynomial, RectifiedPolynomial, polynomial_of

__all__ = [
    "ACTIVATION_KINDS",
    "MAX_DEGREE",
    "SAME_DERIVATIVES_AT_VALUE",
    "Activation",
    "Polynomial",
    "RectifiedPolynomial",
    "ScalarFunction",
    "compute_dtype",
    "polynomial_of",
]

"""``y = p(z)`` or ``p(relu(z))``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import compute_dtype, polynomial_of


def polynomial(z: Tensor, coeffs: Tensor, *, rectified: bool = False) -> Tensor:
    """The executable definition of :func:`chainzrule_kernels.polynomial`: same arguments, shapes and dtypes."""
    dtype = compute_dtype(z)
    (value,) = polynomial_of(coeffs.to(dtype), rectified).derivatives(z.to(dtype), 0)
    return value.to(z.dtype)

"""``y = p(z)``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import Polynomial, compute_dtype


def polynomial(z: Tensor, coeffs: Tensor) -> Tensor:
    """The executable definition of :func:`chainzrule_kernels.polynomial`: same arguments, shapes and dtypes."""
    dtype = compute_dtype(z)
    (value,) = Polynomial(coeffs.to(dtype)).derivatives(z.to(dtype), 0)
    return value.to(z.dtype)

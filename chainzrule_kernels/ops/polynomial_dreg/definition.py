"""``y = p(z)``, ``jac_sq = Σ_j p'(z_j)² row_sq_j``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import Polynomial
from chainzrule_kernels.ops._dreg_definition import dreg


def polynomial_dreg(
    z: Tensor, coeffs: Tensor, row_sq: Tensor | None = None, *, return_derivative: bool = False
) -> tuple[Tensor, ...]:
    """The executable definition of :func:`chainzrule_kernels.polynomial_dreg`: same arguments, shapes and dtypes."""
    return dreg(lambda dtype: Polynomial(coeffs.to(dtype)), z, row_sq, return_derivative)

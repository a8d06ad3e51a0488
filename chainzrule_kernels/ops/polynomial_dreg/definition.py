"""``y = p(z)`` or ``p(relu(z))``, ``jac_sq = Σ_j (dy_j/dz_j)² row_sq_j``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import polynomial_of
from chainzrule_kernels.ops._dreg_definition import dreg


def polynomial_dreg(
    z: Tensor, coeffs: Tensor, row_sq: Tensor | None = None, *, return_derivative: bool = False, rectified: bool = False
) -> tuple[Tensor, ...]:
    """The executable definition of :func:`chainzrule_kernels.polynomial_dreg`: same arguments, shapes and dtypes."""
    return dreg(lambda dtype: polynomial_of(coeffs.to(dtype), rectified), z, row_sq, return_derivative)

"""``y = p(z)``, ``jac_sq = Σ_{c,h,w} p'(z)² tap_sq`` for feature maps, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import Polynomial
from chainzrule_kernels.ops._spatial_definition import spatial_dreg


def polynomial_spatial_dreg(z: Tensor, coeffs: Tensor, tap_sq: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The executable definition of :func:`chainzrule_kernels.polynomial_spatial_dreg`: same arguments and dtypes."""
    return spatial_dreg(lambda dtype: Polynomial(coeffs.to(dtype)), z, tap_sq)

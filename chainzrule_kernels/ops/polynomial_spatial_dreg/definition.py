"""``y = p(z)`` or ``p(relu(z))``, ``jac_sq = Σ_{c,h,w} (dy/dz)² tap_sq`` for feature maps, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import polynomial_of
from chainzrule_kernels.ops._spatial_definition import spatial_dreg


def polynomial_spatial_dreg(
    z: Tensor, coeffs: Tensor, tap_sq: Tensor | None = None, *, rectified: bool = False
) -> tuple[Tensor, Tensor]:
    """The executable definition of :func:`chainzrule_kernels.polynomial_spatial_dreg`: same arguments and dtypes."""
    return spatial_dreg(lambda dtype: polynomial_of(coeffs.to(dtype), rectified), z, tap_sq)

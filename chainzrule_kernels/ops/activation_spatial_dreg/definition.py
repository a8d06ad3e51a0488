"""``y = f(z)``, ``jac_sq = Σ_{c,h,w} f'(z)² tap_sq`` for feature maps and a fixed activation, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import Activation
from chainzrule_kernels.ops._spatial_definition import spatial_dreg


def activation_spatial_dreg(z: Tensor, kind: str, tap_sq: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The executable definition of :func:`chainzrule_kernels.activation_spatial_dreg`: same arguments and dtypes."""
    return spatial_dreg(lambda dtype: Activation(kind), z, tap_sq)

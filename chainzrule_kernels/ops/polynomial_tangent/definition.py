"""``y = p(z)`` or ``p(relu(z))``, ``ẏ = (dy/dz) ż``, ``tangent_sq = Σ_j ẏ_j²``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import polynomial_of
from chainzrule_kernels.ops._tangent_definition import tangent


def polynomial_tangent(
    z: Tensor, z_dot: Tensor, coeffs: Tensor, *, rectified: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The executable definition of :func:`chainzrule_kernels.polynomial_tangent`: same arguments, shapes and dtypes."""
    return tangent(lambda dtype: polynomial_of(coeffs.to(dtype), rectified), z, z_dot)

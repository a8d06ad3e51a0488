"""``y = p(z)``, ``ẏ = p'(z) ż``, ``tangent_sq = Σ_j ẏ_j²``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import Polynomial
from chainzrule_kernels.ops._tangent_definition import tangent


def polynomial_tangent(z: Tensor, z_dot: Tensor, coeffs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The executable definition of :func:`chainzrule_kernels.polynomial_tangent`: same arguments, shapes and dtypes."""
    return tangent(lambda dtype: Polynomial(coeffs.to(dtype)), z, z_dot)

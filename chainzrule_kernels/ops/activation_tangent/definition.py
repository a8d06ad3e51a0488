"""``y = f(z)``, ``ẏ = f'(z) ż``, ``tangent_sq = Σ_j ẏ_j²`` for a fixed activation ``f``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import Activation
from chainzrule_kernels.ops._tangent_definition import tangent


def activation_tangent(z: Tensor, z_dot: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The executable definition of :func:`chainzrule_kernels.activation_tangent`: same arguments, shapes and dtypes."""
    return tangent(lambda dtype: Activation(kind), z, z_dot)

"""``y = f(z)``, ``jac_sq = Σ_j f'(z_j)² row_sq_j`` for a fixed activation ``f``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import Activation
from chainzrule_kernels.ops._dreg_definition import dreg


def activation_dreg(
    z: Tensor, kind: str, row_sq: Tensor | None = None, *, return_derivative: bool = False
) -> tuple[Tensor, ...]:
    """The executable definition of :func:`chainzrule_kernels.activation_dreg`: same arguments, shapes and dtypes."""
    return dreg(lambda dtype: Activation(kind), z, row_sq, return_derivative)

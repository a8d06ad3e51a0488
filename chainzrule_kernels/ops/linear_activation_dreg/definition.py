"""``z = x Wᵀ + b``, ``y = f(z)``, ``jac_sq = ‖diag(f'(z)) W‖_F²``, in plain PyTorch.

Here ``y`` comes from ``z`` in the dtype of the data. A kernel may take ``y`` and ``jac_sq`` from the sum in float32,
before it is rounded for storage, as the one with an epilogue does; the backward sees the stored ``z`` in either case
[a choice of this package]. Both stay within the same allowance of the exact values.
"""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.ops._linear import linear_in_dtype_of_x
from chainzrule_kernels.ops.activation_dreg.definition import activation_dreg
from chainzrule_kernels.ops.squared_weights.definition import squared_row_norms


def linear_activation_dreg(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """The executable definition of :func:`chainzrule_kernels.linear_activation_dreg`, with its arguments and dtypes."""
    z = linear_in_dtype_of_x(x, weight, bias)
    y, jac_sq = activation_dreg(z, kind, squared_row_norms(weight, z))
    return y, jac_sq

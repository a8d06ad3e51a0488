"""The linear map in front of an activation, and the squared norms of its rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from chainzrule_kernels.functions import compute_dtype


def linear_in_dtype_of_x(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` with the parameters in the dtype of ``x``; under autocast, in the autocast dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def squared_row_norms(weight: Tensor, z: Tensor) -> Tensor:
    """``‖W_j‖²`` of the given weight (not of a rounded copy), in the dtype in which an op on ``z`` computes."""
    weight = weight.to(compute_dtype(z))
    return (weight * weight).sum(1)

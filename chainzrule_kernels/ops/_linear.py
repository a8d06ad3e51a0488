"""The linear map in front of an activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_in_dtype_of_x(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` with the parameters in the dtype of ``x``; under autocast, in the autocast dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

"""The definition of value and Jacobian norm of feature maps, for any scalar function (SPEC 2.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chainzrule_kernels.functions import ScalarFunction, compute_dtype
from chainzrule_kernels.functions.sums import sum_over_trailing


def spatial_dreg(
    function_in: Callable[[torch.dtype], ScalarFunction], z: Tensor, tap_sq: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(f(z), Σ_{c,h,w} f'(z)² tap_sq)``; ``function_in(dtype)`` is ``f`` with parameters of that dtype."""
    dtype = compute_dtype(z)
    value, slope = function_in(dtype).derivatives(z.movedim(1, -1).to(dtype), 1)
    squares = slope.square() if tap_sq is None else slope.square() * tap_sq.movedim(0, -1).to(dtype)
    return value.movedim(-1, 1).to(z.dtype), sum_over_trailing(squares)

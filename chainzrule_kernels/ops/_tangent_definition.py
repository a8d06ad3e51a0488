"""The definition of the value and tangent streams, for any scalar function (SPEC 2.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chainzrule_kernels.functions import ScalarFunction, compute_dtype


def tangent(
    function_in: Callable[[torch.dtype], ScalarFunction], z: Tensor, z_dot: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(f(z), f'(z) ż, Σ_j (f'(z_j) ż_j)²)``; ``function_in(dtype)`` is ``f`` with parameters of that dtype."""
    dtype = compute_dtype(z)
    function, computed_z = function_in(dtype), z.to(dtype)
    value, slope = function.derivatives(computed_z, 1)
    y_dot = function.let_through(computed_z, slope * z_dot.to(dtype))
    return value.to(z.dtype), y_dot.to(z_dot.dtype), y_dot.square().sum(-1)

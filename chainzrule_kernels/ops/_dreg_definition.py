"""The definition of value, derivative and Jacobian norm, for any scalar function (SPEC 2.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chainzrule_kernels.functions import ScalarFunction, compute_dtype


def dreg(
    function_in: Callable[[torch.dtype], ScalarFunction], z: Tensor, row_sq: Tensor | None, return_derivative: bool
) -> tuple[Tensor, ...]:
    """``(f(z), Σ_j f'(z_j)² row_sq_j[, f'(z)])``; ``function_in(dtype)`` is ``f`` with parameters of that dtype."""
    dtype = compute_dtype(z)
    value, slope = function_in(dtype).derivatives(z.to(dtype), 1)
    squares = slope.square() if row_sq is None else slope.square() * row_sq.to(dtype)
    results = (value.to(z.dtype), squares.sum(-1))
    return (*results, slope.to(z.dtype)) if return_derivative else results

"""Sums whose order, and so whose last bit, does not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 1024


def sum_of_all(values: Tensor) -> Tensor:
    """``Σ values``, a 0-d tensor.

    PyTorch cuts a sum into one number among its threads once there are 32768 terms, and a sum into several numbers
    never. So the terms are first added to 1024 sums. A compiled function sums as its compiler decides.
    """
    if torch.compiler.is_compiling() or values.numel() <= _COLUMNS:
        return values.sum()
    flat = values.reshape(-1)
    whole = flat.shape[0] // _COLUMNS * _COLUMNS
    return flat[:whole].reshape(-1, _COLUMNS).sum(0).sum() + flat[whole:].sum()


def sum_over_leading(values: Tensor, kept: int = 1) -> Tensor:
    """The sum over every dimension but the last ``kept``: ``(..., N) -> (N,)``."""
    leading = values.dim() - kept
    if leading == 0:
        return values
    if values.shape[leading:].numel() == 1:
        return sum_of_all(values).reshape(values.shape[leading:])
    return values.sum(tuple(range(leading)))


def sum_over_trailing(values: Tensor) -> Tensor:
    """The sum over every dimension but the first: ``(B, ...) -> (B,)``."""
    if values.dim() == 1:
        return values
    if not torch.compiler.is_compiling() and values.shape[0] == 1:
        return sum_of_all(values).reshape(1)
    return values.sum(tuple(range(1, values.dim())))

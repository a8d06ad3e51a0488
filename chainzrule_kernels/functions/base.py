"""What an op needs to know of a scalar function."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


def compute_dtype(z: Tensor) -> torch.dtype:
    """The dtype in which an op computes and sums: float64 for float64 data, float32 for everything else.

    Half precision is never used for arithmetic: ``z³`` overflows float16 at ``z = 40.3``.
    """
    return torch.float64 if z.dtype == torch.float64 else torch.float32


class ScalarFunction(Protocol):
    """A function ``f: R -> R`` applied to every element of ``z (..., N)``, perhaps another one for each channel."""

    def derivatives(self, z: Tensor, order: int) -> tuple[Tensor, ...]:
        """``(f(z), f'(z), …, f^(order)(z))`` with ``order <= 3``, each differentiable by autograd."""
        ...

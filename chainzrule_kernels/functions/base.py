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

    curved: bool
    """False where ``f''`` is zero everywhere: nothing passes through it then, where ``0 · ∞`` would be NaN."""

    def derivatives(self, z: Tensor, order: int) -> tuple[Tensor, ...]:
        """``(f(z), f'(z), …, f^(order)(z))`` with ``order <= 3``, each differentiable by autograd."""
        ...

    def let_through(self, z: Tensor, values: Tensor) -> Tensor:
        """``values``, products with derivatives of ``f`` at ``z``; 0 where relu, if ``f`` has one, is flat.

        Like PyTorch's relu it then selects and does not multiply: a gradient that is infinite or NaN is stopped, too.
        """
        ...


def where_rising(z: Tensor, values: Tensor) -> Tensor:
    """``values``, and 0 where relu is flat: for ``z <= 0``, which NaN is not."""
    return torch.where(z <= 0, 0.0, values)

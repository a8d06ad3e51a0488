"""The fixed activations: one generator each, which yields the value and then its derivatives (SPEC 2.2).

Every formula is exact and is itself differentiable by autograd, so that derivatives of any order stay right. The C++
and CUDA twin of this file is ``csrc/math/activations.h``; a new activation is one generator here and one struct there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from chainzrule_kernels.functions.base import where_rising


def _relu(z: Tensor) -> Iterator[Tensor]:
    yield F.relu(z)
    # As in PyTorch, the slope is 0 at 0 and 1 at NaN. Through sign it stays part of the graph, with derivative 0.
    yield torch.where(torch.isnan(z), torch.ones_like(z), torch.relu(torch.sign(z)))
    yield torch.zeros_like(z)
    yield torch.zeros_like(z)


_STRAIGHT = frozenset({"relu"})
"""The kinds without curvature, which are flat for ``z <= 0`` and let nothing through there."""


def _bounded(z: Tensor) -> Tensor:
    """``z`` where a derivative still moves. Farther out it has reached its limit, and ``0 · ∞`` would make it NaN."""
    # Unlike clamp, this lets the gradient of NaN through.
    return torch.where(z > 1e3, 1e3, torch.where(z < -1e3, -1e3, z))


def _gelu(z: Tensor) -> Iterator[Tensor]:
    probability = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    yield z * probability
    z = _bounded(z)
    density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    yield probability + z * density
    yield density * (2 - z * z)
    yield density * z * (z * z - 4)


def _gelu_tanh(z: Tensor) -> Iterator[Tensor]:
    cubic = 0.044715
    scale = math.sqrt(2 / math.pi)
    bounded = _bounded(z)
    t = torch.tanh(scale * (bounded + cubic * bounded**3))
    yield 0.5 * z * (1 + t)
    z = bounded
    inner_1 = scale * (1 + 3 * cubic * z * z)
    inner_2 = 6 * scale * cubic * z
    inner_3 = 6 * scale * cubic
    s = 1 - t * t
    t_1 = s * inner_1
    yield 0.5 * (1 + t) + 0.5 * z * t_1
    t_2 = s * (inner_2 - 2 * t * inner_1 * inner_1)
    yield t_1 + 0.5 * z * t_2
    t_3 = s * (inner_3 - 6 * t * inner_1 * inner_2 + (6 * t * t - 2) * inner_1**3)
    yield 1.5 * t_2 + 0.5 * z * t_3


def _sigmoid(z: Tensor) -> Iterator[Tensor]:
    s = torch.sigmoid(z)
    yield s
    slope = s * (1 - s)
    yield slope
    yield slope * (1 - 2 * s)
    yield slope * (1 - 6 * slope)


def _silu(z: Tensor) -> Iterator[Tensor]:
    yield F.silu(z)
    z = _bounded(z)
    s, s_1, s_2, s_3 = _sigmoid(z)
    yield s + z * s_1
    yield 2 * s_1 + z * s_2
    yield 3 * s_2 + z * s_3


def _tanh(z: Tensor) -> Iterator[Tensor]:
    t = torch.tanh(z)
    yield t
    s = 1 - t * t
    yield s
    yield -2 * t * s
    yield s * (6 * t * t - 2)


def _softplus(z: Tensor) -> Iterator[Tensor]:
    # PyTorch's own threshold, 20, is exact for float32 and not for float64.
    yield F.softplus(z, threshold=40.0)
    yield from _sigmoid(z)


def _mish(z: Tensor) -> Iterator[Tensor]:
    yield F.mish(z)
    z = _bounded(z)
    w = torch.tanh(F.softplus(z, threshold=40.0))
    s, s_1, s_2, _ = _sigmoid(z)
    q = 1 - w * w
    w_1 = q * s
    yield w + z * w_1
    w_2 = q * (s_1 - 2 * w * s * s)
    yield 2 * w_1 + z * w_2
    w_3 = q * (s_2 - 6 * w * s * s_1 + (4 * w * w - 2 * q) * s**3)
    yield 3 * w_2 + z * w_3


_DERIVATIVES: dict[str, Callable[[Tensor], Iterator[Tensor]]] = {
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "mish": _mish,
}

ACTIVATION_KINDS: tuple[str, ...] = tuple(_DERIVATIVES)

SAME_DERIVATIVES_AT_VALUE = frozenset({"relu"})
"""The kinds with ``f^(k)(f(z)) = f^(k)(z)`` for ``k >= 1``, whose derivatives need ``y`` and not ``z``."""


class Activation:
    """One of :data:`ACTIVATION_KINDS`, with exact derivatives up to the third."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.curved = kind not in _STRAIGHT

    def derivatives(self, z: Tensor, order: int) -> tuple[Tensor, ...]:
        """``(f, f', …, f^(order))`` at ``z``, ``order <= 3``."""
        generator = _DERIVATIVES[self.kind](z)
        return tuple([next(generator) for _ in range(order + 1)])

    def let_through(self, z: Tensor, values: Tensor) -> Tensor:
        """``values``; of relu 0 where it is flat."""
        return values if self.curved else where_rising(z, values)

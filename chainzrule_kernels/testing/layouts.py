"""The same values in different places of memory: every arrangement that an op must read correctly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Arrangement = Callable[[Tensor], Tensor]


def contiguous(values: Tensor) -> Tensor:
    """Row after row."""
    return values.contiguous()


def misaligned(values: Tensor) -> Tensor:
    """Contiguous, but starting one element into its storage: no wide load is aligned."""
    buffer = _unused_memory(values, (values.numel() + 1,))
    return buffer[1:].view(values.shape).copy_(values)


def transposed(values: Tensor) -> Tensor:
    """The last two dimensions swapped in memory; a vector gets stride 2."""
    return values.mT.contiguous().mT if values.dim() > 1 else sliced(values)


def sliced(values: Tensor) -> Tensor:
    """Every second element of a larger buffer. What lies between is NaN, so that reading it shows."""
    if values.dim() == 0:
        return misaligned(values)
    buffer = _unused_memory(values, (*values.shape[:-1], 2 * values.shape[-1] + 1))
    return buffer[..., 1::2].copy_(values)


def permuted(values: Tensor) -> Tensor:
    """The last dimension second in memory, as in an ``(N, C, H, W)`` image seen as ``(N, H, W, C)``."""
    return values.movedim(-1, 1).contiguous().movedim(1, -1) if values.dim() > 2 else transposed(values)


def channels_innermost(values: Tensor) -> Tensor:
    """The second dimension last in memory, as in ``torch.channels_last``."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if values.dim() > 2 else transposed(values)


def expanded(values: Tensor) -> Tensor:
    """The first row for every row, with stride 0. (This arrangement changes the values.)"""
    return values[:1].expand_as(values) if values.dim() > 0 else values


def broadcast(values: Tensor) -> Tensor:
    """The first channel for every channel, with stride 0. (This arrangement changes the values.)"""
    return values[..., :1].expand_as(values) if values.dim() > 0 else values


def _unused_memory(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Layout:
    """A shape of the data together with its arrangement in memory.

    Attributes:
        name: for people.
        shape: of ``z``, or of ``x`` for the linear ops.
        arrange: puts values into that arrangement.
        changes_values: whether the arrangement repeats some values in the place of others.
    """

    name: str
    shape: tuple[int, ...]
    arrange: Arrangement
    changes_values: bool = False


# 37 channels: whole vectors and a rest, at every vector width and dtype.
_SHAPE = (2, 3, 4, 37)

LAYOUTS: tuple[Layout, ...] = (
    Layout("contiguous", _SHAPE, contiguous),
    Layout("misaligned", _SHAPE, misaligned),
    Layout("transposed", _SHAPE, transposed),
    Layout("sliced", _SHAPE, sliced),
    Layout("permuted", _SHAPE, permuted),
    Layout("channels innermost", _SHAPE, channels_innermost),
    Layout("expanded", (6, 37), expanded, changes_values=True),
    Layout("broadcast", (6, 37), broadcast, changes_values=True),
    Layout("long rows", (2, 2500), contiguous),
    Layout("many rows", (1300, 3), contiguous),
    Layout("one row", (37,), contiguous),
    Layout("one element", (1, 1), contiguous),
    Layout("empty batch", (0, 5), contiguous),
    Layout("no channels", (3, 0), contiguous),
)
"""The layouts that ``validate`` and the tests go through."""

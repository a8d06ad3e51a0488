"""The convolution in front of a polynomial: what its arguments mean (SPEC 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chainzrule_kernels._remembered import remembered

Numbers = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Geometry:
    """Where the windows of a convolution lie.

    Attributes:
        stride: between windows, one number for each spatial dimension; likewise everything below.
        padding: zeros before and behind the image.
        dilation: between the taps of a window.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def even_padding(self) -> list[int]:
        """What is the same before and behind, which the libraries' convolutions take."""
        return [min(pair) for pair in self.padding]

    @property
    def even(self) -> bool:
        """Whether the padding before and behind the image is the same."""
        for low, high in self.padding:  # noqa: SIM110 - asked at every call
            if low != high:
                return False
        return True

    @property
    def padded(self) -> bool:
        """Whether some taps may fall outside the image."""
        return any(size > 0 for pair in self.padding for size in pair)

    def out_size(self, size: Sequence[int], window: Sequence[int]) -> list[int]:
        """The spatial sizes of the result."""
        where = zip(size, window, self.stride, self.padding, self.dilation, strict=True)
        return [out_size(length, taps, stride, sum(pair), apart) for length, taps, stride, pair, apart in where]


def out_size(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """How many windows there are in one dimension; ``padding`` on both sides together."""
    return (size + padding - dilation * (taps - 1) - 1) // stride + 1


@remembered
def geometry(window: Sequence[int], stride: Numbers, padding: Padding, dilation: Numbers) -> Geometry:
    """The arguments of a convolution, in the one form that the rest of the package uses."""
    dimensions = len(window)
    strides, dilations = _for_each_dimension(stride, dimensions), _for_each_dimension(dilation, dimensions)
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        reaches = [step * (taps - 1) for taps, step in zip(window, dilations, strict=True)]
        pairs = [(reach // 2, reach - reach // 2) for reach in reaches]
    elif isinstance(padding, int):
        pairs = [(padding, padding)] * dimensions
    else:
        pairs = [(entry, entry) if isinstance(entry, int) else entry for entry in padding]
        if len(pairs) < dimensions:
            pairs = pairs * dimensions
    return Geometry(strides, tuple((low, high) for low, high in pairs), dilations)


def _for_each_dimension(value: Numbers, dimensions: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dimensions
    return tuple(value) * dimensions if len(value) < dimensions else tuple(value)


def with_uneven_padding(x: Tensor, where: Geometry) -> Tensor:
    """``x`` with the zeros that :attr:`Geometry.even_padding` leaves out."""
    if where.even:
        return x
    rest = [(low - even, high - even) for (low, high), even in zip(where.padding, where.even_padding, strict=True)]
    return F.pad(x, [size for pair in reversed(rest) for size in pair])


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    """The library's convolution, in the dtype of ``x``; ``where`` is ``stride, padding, dilation, groups``."""
    stride, padding, dilation, groups = where
    none = [0] * len(stride)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, none, groups)


def in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``; one that has it already costs no call of PyTorch."""
    return value if value.dtype == dtype else value.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would send float32 convolutions and matrix products to half precision."""
    return torch.autocast(device.type, enabled=False) if _autocast(device) else nullcontext()


def dtype_of_convolution(x: Tensor) -> torch.dtype:
    """That of ``x``; under autocast, as for PyTorch's convolutions, the autocast dtype."""
    if x.dtype != torch.float64 and _autocast(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _autocast(device: torch.device) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    # Of devices that have none, such as meta, PyTorch refuses to say whether it is enabled.
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)

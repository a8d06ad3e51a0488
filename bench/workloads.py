"""What is measured: an op on one set of arguments, with the bytes that any implementation of it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import chainzrule_kernels as ck


@dataclass(frozen=True)
class Size:
    """Rows, channels and dtype of ``z``, and the name under which results are recorded."""

    label: str
    rows: int
    channels: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.label} {self.rows}x{self.channels} {str(self.dtype).removeprefix('torch.')}"


MAIN = Size("main", 2048, 1024)
SIZES = (
    MAIN,
    Size("large", 8192, 1024),
    Size("small", 64, 256),
    Size("bfloat16", 2048, 1024, torch.bfloat16),
)


@dataclass(frozen=True)
class Workload:
    """An op on one set of arguments.

    Attributes:
        op: the public function's name.
        label: which arguments, unique among the workloads of the op.
        arguments: positional, tensors and constants.
        gradients: what arrives for each output in the backward.
        forward_bytes: read and written by a forward pass that touches each large tensor once.
        backward_bytes: the same of a backward pass.
    """

    op: str
    label: str
    arguments: tuple[Any, ...]
    gradients: tuple[Tensor, ...]
    forward_bytes: int
    backward_bytes: int

    @property
    def fused(self) -> Callable[..., Any]:
        """The public function."""
        return getattr(ck, self.op)

    @property
    def reference(self) -> Callable[..., Any]:
        """The definition in plain PyTorch."""
        return getattr(ck.reference, self.op)

    def in_float64(self) -> Workload:
        """The same workload on the same rounded values, in double precision."""
        return Workload(
            self.op,
            self.label,
            tuple(value.double() if isinstance(value, Tensor) else value for value in self.arguments),
            tuple(gradient.double() for gradient in self.gradients),
            2 * self.forward_bytes,
            2 * self.backward_bytes,
        )


def polynomial(size: Size) -> Workload:
    """``y = p(z)``, cubic, one polynomial per channel."""
    draw = _Draw()
    z = draw.data(size)
    return Workload("polynomial", str(size), (z, draw.coefficients(size)), (draw.data(size),), *_floors(z))


def polynomial_dreg(size: Size, shared: bool = False) -> Workload:
    """Value and norm of a cubic, with one polynomial per channel or one for all."""
    draw = _Draw()
    z = draw.data(size)
    coefficients = draw.coefficients(size)[:, 0].clone() if shared else draw.coefficients(size)
    label = f"{size}, shared coefficients" if shared else str(size)
    gradients = (draw.data(size), draw.per_row(size))
    return Workload("polynomial_dreg", label, (z, coefficients, draw.row_sq(size)), gradients, *_floors(z))


def activation_dreg(size: Size) -> Workload:
    """Value and norm of the exact gelu, the dearest of the common activations."""
    draw = _Draw()
    z = draw.data(size)
    gradients = (draw.data(size), draw.per_row(size))
    return Workload("activation_dreg", f"{size}, gelu", (z, "gelu", draw.row_sq(size)), gradients, *_floors(z))


def polynomial_tangent(size: Size, tangents: int = 4) -> Workload:
    """A cubic with four tangents."""
    draw = _Draw()
    z = draw.data(size)
    z_dot = torch.stack([draw.data(size) for _ in range(tangents)])
    arguments = (z, z_dot, draw.coefficients(size))
    return Workload("polynomial_tangent", f"{size}, {tangents} tangents", arguments, *_tangent_part(draw, size, z_dot))


def activation_tangent(size: Size, tangents: int = 4) -> Workload:
    """The exact gelu with four tangents."""
    draw = _Draw()
    z = draw.data(size)
    z_dot = torch.stack([draw.data(size) for _ in range(tangents)])
    label = f"{size}, gelu, {tangents} tangents"
    return Workload("activation_tangent", label, (z, z_dot, "gelu"), *_tangent_part(draw, size, z_dot))


def linear_polynomial_dreg(size: Size) -> Workload:
    """A square linear layer with its cubic and its norm."""
    draw = _Draw()
    arguments = (*draw.linear(size), draw.coefficients(size))
    gradients = (draw.data(size), draw.per_row(size))
    return Workload(
        "linear_polynomial_dreg", str(size), arguments, gradients, *_linear_floors(arguments[0], arguments[1])
    )


def linear_activation_dreg(size: Size) -> Workload:
    """A square linear layer with the exact gelu and its norm."""
    draw = _Draw()
    arguments = (*draw.linear(size), "gelu")
    gradients = (draw.data(size), draw.per_row(size))
    floors = _linear_floors(arguments[0], arguments[1])
    return Workload("linear_activation_dreg", f"{size}, gelu", arguments, gradients, *floors)


class _Draw:
    """Arguments from one seed."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def data(self, size: Size) -> Tensor:
        return self._normal(size.rows, size.channels).to(size.dtype)

    def per_row(self, size: Size) -> Tensor:
        return self._normal(size.rows)

    def coefficients(self, size: Size, degree: int = 3) -> Tensor:
        return 0.3 * self._normal(degree + 1, size.channels)

    def row_sq(self, size: Size) -> Tensor:
        return self._normal(size.channels).square()

    def linear(self, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        weight = self._normal(size.channels, size.channels) / size.channels**0.5
        return self.data(size), weight, 0.1 * self._normal(size.channels)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _floors(z: Tensor) -> tuple[int, int]:
    """Forward: read ``z``, write ``y``. Backward: read ``z`` and the gradient of ``y``, write that of ``z``."""
    return 2 * _bytes(z), 3 * _bytes(z)


def _tangent_part(draw: _Draw, size: Size, z_dot: Tensor) -> tuple[tuple[Tensor, ...], int, int]:
    """Gradients and floors of a tangent op: each of the ``T`` tangents counts like ``z``."""
    tangents = z_dot.shape[0]
    gradients = (draw.data(size), torch.stack([draw.data(size) for _ in range(tangents)]))
    squares = torch.stack([draw.per_row(size) for _ in range(tangents)])
    streams = (1 + tangents) * (_bytes(z_dot) // tangents)
    return (*gradients, squares), 2 * streams, 3 * streams


def _linear_floors(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Forward: read ``x`` and the weight, write ``z`` and ``y``.

    Backward: read ``x``, the weight, ``z`` and the gradient of ``y``, write the gradients of ``x`` and of the weight.
    """
    return 3 * _bytes(x) + _bytes(weight), 4 * _bytes(x) + 2 * _bytes(weight)

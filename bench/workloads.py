"""What is measured: an op on one set of arguments, with the bytes that any implementation of it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import chainzrule_kernels as ck
from bench.peers import LIGER_POLY_NORM, LIGER_RELU_SQUARED, TORCHORTHO_HERMITE, Peer


@dataclass(frozen=True)
class Size:
    """Rows, channels and dtype of ``z``, and the name under which results are recorded.

    Attributes:
        label: the name.
        rows: samples, or tokens of all samples.
        channels: of ``z``.
        dtype: of the data.
        inputs: of the linear layer that makes ``z``, where an op contains it; ``channels`` where not given.
        model: the real model that the shape comes from.
        sweep: the quantity that grows from size to size, where they are a series.
        compiled: whether ``torch.compile`` is measured there.
    """

    label: str
    rows: int
    channels: int
    dtype: torch.dtype = torch.float32
    inputs: int | None = None
    model: str | None = None
    sweep: str | None = None
    compiled: bool = True

    @property
    def position(self) -> int | None:
        """The quantity that grows, here; None where it is not one of the size."""
        return {"batch": self.rows, "width": self.channels}.get(self.sweep or "")

    def __str__(self) -> str:
        return f"{self.label} {self.rows}x{self.channels} {str(self.dtype).removeprefix('torch.')}"


MAIN = Size("main", 2048, 1024)
SIZES = (
    MAIN,
    Size("large", 8192, 1024),
    Size("small", 64, 256),
    Size("bfloat16", 2048, 1024, torch.bfloat16),
)

GPT_2 = Size("GPT-2 small MLP", 1024, 3072, inputs=768, model="GPT-2 small, 1024 tokens")
VIT = Size("ViT-B MLP", 1576, 3072, inputs=768, model="ViT-B/16, 8 images")
CHAINZRULE = Size("ChainzRule net", 128, 64, inputs=64, model="ChainzRule net for a table, width 64", compiled=False)

BATCH_SWEEP = tuple(Size("batch sweep", rows, 512, sweep="batch") for rows in (256, 512, 1024, 2048, 4096))
WIDTH_SWEEP = tuple(Size("width sweep", 512, channels, sweep="width") for channels in (256, 512, 1024, 2048, 4096))
DEGREE_SWEEP = (1, 2, 3, 5, 8)
TANGENT_SWEEP = (1, 2, 4, 8)
DEGREE_SIZE = Size("degree sweep", 1024, 1024)
TANGENT_SIZE = Size("tangents sweep", 1024, 512)


@dataclass(frozen=True)
class Workload:
    """An op on one set of arguments.

    Attributes:
        op: the public function's name.
        label: which arguments, unique among the workloads of the op.
        arguments: positional, tensors and constants.
        gradients: what arrives for each output in the backward.
        forward_bytes: read and written by a forward pass without gradients that touches each large tensor once.
        backward_bytes: the same of a backward pass.
        saved_bytes: what a forward pass writes beside its results for the backward one.
        forward_operations: floating-point operations of a forward pass, where those bound the work.
        backward_operations: the same of a backward pass.
        sweep: which quantity grows over a series of workloads.
        position: that quantity here.
        model: the real model that the shape comes from.
        form: from the op to what is measured, where that is not the op on these arguments as they are.
        peers: functions of other libraries that do the nearest job.
        compiled: whether ``torch.compile`` is measured: compiling takes longer than measuring.
    """

    op: str
    label: str
    arguments: tuple[Any, ...]
    gradients: tuple[Tensor, ...]
    forward_bytes: int
    backward_bytes: int
    forward_operations: int | None = None
    backward_operations: int | None = None
    sweep: str | None = None
    position: int | None = None
    model: str | None = None
    form: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    peers: tuple[Peer, ...] = ()
    compiled: bool = True
    saved_bytes: int = 0

    @property
    def fused(self) -> Callable[..., Any]:
        """The public function."""
        return self._formed(getattr(ck, self.op))

    @property
    def reference(self) -> Callable[..., Any]:
        """The definition in plain PyTorch."""
        return self._formed(getattr(ck.reference, self.op))

    def _formed(self, op: Callable[..., Any]) -> Callable[..., Any]:
        return op if self.form is None else self.form(op)

    def bytes_at(self, stage: str) -> int:
        """The bytes that a stage must move."""
        both = self.forward_bytes + self.saved_bytes + self.backward_bytes
        return {"forward": self.forward_bytes, "backward": self.backward_bytes, "both": both}[stage]

    def operations_at(self, stage: str) -> int | None:
        """The floating-point operations of a stage, where those bound the work."""
        if self.forward_operations is None or self.backward_operations is None:
            return None
        both = self.forward_operations + self.backward_operations
        return {"forward": self.forward_operations, "backward": self.backward_operations, "both": both}[stage]

    def in_float64(self) -> Workload:
        """The same workload on the same rounded values, in double precision."""
        return replace(
            self,
            arguments=tuple(value.double() if isinstance(value, Tensor) else value for value in self.arguments),
            gradients=tuple(gradient.double() for gradient in self.gradients),
            forward_bytes=2 * self.forward_bytes,
            backward_bytes=2 * self.backward_bytes,
            saved_bytes=2 * self.saved_bytes,
        )


def polynomial(size: Size) -> Workload:
    """``y = p(z)``, cubic, one polynomial per channel."""
    draw = _Draw()
    z = draw.data(size)
    return _on(size, "polynomial", "", (z, draw.coefficients(size)), (draw.data(size),), _floors(z))


def shared_polynomial(size: Size) -> Workload:
    """A cubic for all channels, beside Liger's PolyNorm, which normalises each power over the row as well."""
    draw = _Draw()
    z = draw.data(size)
    arguments = (z, draw.coefficients(size)[:, 0].clone())
    shared = _on(size, "polynomial", "shared coefficients", arguments, (draw.data(size),), _floors(z))
    return replace(shared, peers=(LIGER_POLY_NORM,))


def relu_squared_of(op: Callable[..., Any], device: str = "cpu") -> Callable[..., Any]:
    """From ``polynomial`` to ``relu(z)²``."""
    # Made here and not at each call: while a CUDA graph is recorded nothing may be copied to the GPU.
    square = torch.tensor((0.0, 0.0, 1.0), device=device)

    def form(z: Tensor) -> Tensor:
        y: Tensor = op(z, square, rectified=True)
        return y

    return form


def hermite_of(op: Callable[..., Any], device: str = "cpu") -> Callable[..., Any]:
    """From ``polynomial`` to the cubic Hermite activation of coefficients ``a``."""
    basis = ck.coefficients.hermite(torch.eye(4, device=device))

    def form(z: Tensor, a: Tensor) -> Tensor:
        y: Tensor = op(z, basis.to(a.dtype) @ a)
        return y

    return form


def relu_squared(size: Size) -> Workload:
    """``relu(z)²``, the rectified square, beside Liger's."""
    draw = _Draw()
    z = draw.data(size)
    rectified = _on(size, "polynomial", "relu squared", (z,), (draw.data(size),), _floors(z))
    return replace(rectified, form=relu_squared_of, peers=(LIGER_RELU_SQUARED,), compiled=False)


def hermite(size: Size) -> Workload:
    """A Hermite activation of degree 3, learnable coefficients shared by the channels, beside torchortho's."""
    draw = _Draw()
    z = draw.data(size)
    arguments = (z, ck.coefficients.hermite_start(3))
    activation = _on(size, "polynomial", "Hermite", arguments, (draw.data(size),), _floors(z))
    return replace(activation, form=hermite_of, peers=(TORCHORTHO_HERMITE,), compiled=False)


def polynomial_dreg(size: Size, shared: bool = False) -> Workload:
    """Value and norm of a cubic, with one polynomial per channel or one for all."""
    draw = _Draw()
    z = draw.data(size)
    coefficients = draw.coefficients(size)[:, 0].clone() if shared else draw.coefficients(size)
    gradients = (draw.data(size), draw.per_row(size))
    arguments = (z, coefficients, draw.row_sq(size))
    return _on(size, "polynomial_dreg", "shared coefficients" if shared else "", arguments, gradients, _floors(z))


def polynomial_dreg_of_degree(degree: int, size: Size = DEGREE_SIZE) -> Workload:
    """Value and norm of a polynomial of some degree, one per channel."""
    draw = _Draw()
    z = draw.data(size)
    arguments = (z, draw.coefficients(size, degree) / degree, draw.row_sq(size))
    gradients = (draw.data(size), draw.per_row(size))
    workload = _on(size, "polynomial_dreg", f"degree {degree}", arguments, gradients, _floors(z))
    return replace(workload, sweep="degree", position=degree)


def activation_dreg(size: Size, kind: str = "gelu") -> Workload:
    """Value and norm of an activation; the exact gelu is the dearest of the common ones."""
    draw = _Draw()
    z = draw.data(size)
    gradients = (draw.data(size), draw.per_row(size))
    return _on(size, "activation_dreg", kind, (z, kind, draw.row_sq(size)), gradients, _floors(z))


def polynomial_tangent(size: Size, tangents: int = 4) -> Workload:
    """A cubic with some tangents."""
    draw = _Draw()
    z = draw.data(size)
    z_dot = torch.stack([draw.data(size) for _ in range(tangents)])
    arguments = (z, z_dot, draw.coefficients(size))
    return _on(size, "polynomial_tangent", f"{tangents} tangents", arguments, *_tangent_part(draw, size, z_dot))


def activation_tangent(size: Size, tangents: int = 4) -> Workload:
    """The exact gelu with some tangents."""
    draw = _Draw()
    z = draw.data(size)
    z_dot = torch.stack([draw.data(size) for _ in range(tangents)])
    form = f"gelu, {tangents} tangents"
    return _on(size, "activation_tangent", form, (z, z_dot, "gelu"), *_tangent_part(draw, size, z_dot))


def linear_polynomial_dreg(size: Size) -> Workload:
    """A linear layer with its cubic and its norm."""
    draw = _Draw()
    arguments = (*draw.linear(size), draw.coefficients(size))
    return _linear(draw, size, "linear_polynomial_dreg", "", arguments)


def linear_activation_dreg(size: Size, kind: str = "gelu") -> Workload:
    """A linear layer with an activation and its norm."""
    draw = _Draw()
    return _linear(draw, size, "linear_activation_dreg", kind, (*draw.linear(size), kind))


def _linear(draw: _Draw, size: Size, op: str, form: str, arguments: tuple[Any, ...]) -> Workload:
    x, weight = arguments[:2]
    gradients = (draw.data(size), draw.per_row(size))
    workload = _on(size, op, form, arguments, gradients, _linear_floors(x, weight))
    product = 2 * size.rows * weight.numel()
    saved = _bytes(gradients[0])
    return replace(workload, saved_bytes=saved, forward_operations=product, backward_operations=2 * product)


def polynomial_spatial_dreg(shape: tuple[int, int, int, int], model: str) -> Workload:
    """Value and norm of a cubic of feature maps ``(B, C, H, W)``, channels innermost, one polynomial per channel."""
    draw = _Draw()
    z = draw.feature_maps(shape)
    arguments = (z, draw.coefficients(Size("", 1, shape[1])), draw.per_element(shape[1:]).square())
    return _on_maps("polynomial_spatial_dreg", shape, "", arguments, draw, model)


def activation_spatial_dreg(shape: tuple[int, int, int, int], model: str, kind: str = "relu") -> Workload:
    """Value and norm of an activation of feature maps, channels innermost."""
    draw = _Draw()
    z = draw.feature_maps(shape)
    arguments = (z, kind, draw.per_element(shape[1:]).square())
    return _on_maps("activation_spatial_dreg", shape, kind, arguments, draw, model)


def _on(
    size: Size,
    op: str,
    form: str,
    arguments: tuple[Any, ...],
    gradients: tuple[Tensor, ...],
    floors: tuple[int, int],
) -> Workload:
    """A workload at a size, with what the size says of itself."""
    label = f"{size}, {form}" if form else str(size)
    place: dict[str, Any] = {name: getattr(size, name) for name in ("sweep", "position", "model", "compiled")}
    return Workload(op, label, arguments, gradients, *floors, **place)


def _on_maps(
    op: str, shape: tuple[int, int, int, int], form: str, arguments: tuple[Any, ...], draw: _Draw, model: str
) -> Workload:
    label = "x".join(map(str, shape)) + (f", {form}" if form else "")
    gradients = (draw.feature_maps(shape), draw.per_element(shape[:1]))
    forward, backward = _floors(arguments[0])
    # Some images only share the squared taps, so that these are no small tensor: read, and their gradient written.
    taps = _bytes(arguments[2])
    return Workload(op, label, arguments, gradients, forward + taps, backward + 2 * taps, model=model)


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
        inputs = size.inputs or size.channels
        weight = self._normal(size.channels, inputs) / inputs**0.5
        return self._normal(size.rows, inputs).to(size.dtype), weight, 0.1 * self._normal(size.channels)

    def feature_maps(self, shape: tuple[int, int, int, int]) -> Tensor:
        return self._normal(*shape).contiguous(memory_format=torch.channels_last)

    def per_element(self, shape: tuple[int, ...]) -> Tensor:
        return self._normal(*shape)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _floors(z: Tensor) -> tuple[int, int]:
    """Forward: read ``z``, write ``y``. Backward: read ``z`` and the gradient of ``y``, write that of ``z``."""
    return 2 * _bytes(z), 3 * _bytes(z)


def _tangent_part(draw: _Draw, size: Size, z_dot: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Gradients and floors of a tangent op: each of the ``T`` tangents counts like ``z``."""
    tangents = z_dot.shape[0]
    gradients = (draw.data(size), torch.stack([draw.data(size) for _ in range(tangents)]))
    squares = torch.stack([draw.per_row(size) for _ in range(tangents)])
    streams = (1 + tangents) * (_bytes(z_dot) // tangents)
    return (*gradients, squares), (2 * streams, 3 * streams)


def _linear_floors(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Forward: read ``x`` and the weight, write ``y``; for a backward ``z`` as well, which is counted as saved.

    Backward: read ``x``, the weight, ``z`` and the gradient of ``y``, write the gradients of ``x`` and of the weight.
    """
    y = _bytes(x) // weight.shape[1] * weight.shape[0]
    return _bytes(x) + y + _bytes(weight), 2 * _bytes(x) + 2 * y + 2 * _bytes(weight)

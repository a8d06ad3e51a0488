"""Polynomial-kernel convolution at the layers of a ResNet: R-PKN ``a (conv(x, W) + b + c)²`` (arXiv 2312.15229).

Beside it the library's convolution alone, the same in eager PyTorch and under ``torch.compile``, and the published way:
every patch of the image unfolded, a matrix product, a power. Images are ``torch.channels_last``, but for the unfolded,
which has no use for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import chainzrule_kernels as ck
from bench.providers import Provider, compile_provider, copies, output_and_gradients, provider
from bench.workloads import Workload


@dataclass(frozen=True)
class Layer:
    """A convolution: ``images`` of ``channels`` to ``filters`` of the same ``size`` in both dimensions, stride 1.

    ``model`` is where it comes from; ``sweep`` the quantity that grows from layer to layer, where they are a series.
    """

    channels: int
    filters: int
    size: int
    window: int
    images: int = 16
    model: str | None = None
    sweep: str | None = None

    @property
    def position(self) -> int | None:
        """The quantity that grows, here."""
        return {"batch": self.images, "channels": self.channels}.get(self.sweep or "")

    def __str__(self) -> str:
        taps = f"{self.window}x{self.window}"
        series = f", {self.sweep} sweep" if self.sweep else ""
        return f"{self.images}x{self.channels}x{self.size}x{self.size}, {taps} to {self.filters}{series}"


RESNET = (
    Layer(64, 64, 56, 3, model="ResNet-18 stage 1"),
    Layer(128, 128, 28, 3, model="ResNet-18 stage 2"),
    Layer(256, 256, 14, 3, model="ResNet-18 stage 3"),
    Layer(512, 512, 7, 3, model="ResNet-18 stage 4"),
    Layer(64, 256, 56, 1, model="ResNet-50 stage 1"),
)
WITH_NORM = (RESNET[0], RESNET[3])
SWEEPS = (
    *(Layer(channels, channels, 28, 3, 8, sweep="channels") for channels in (16, 32, 64, 128)),
    *(Layer(64, 64, 28, 3, images, sweep="batch") for images in (2, 4, 8, 16)),
)


def shrunk(layer: Layer) -> Layer:
    """The same layer with next to nothing to compute; a sweep still grows."""
    return replace(layer, channels=layer.channels // 4, filters=layer.filters // 4, size=7, images=layer.images // 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    for name, layers in (("layer", RESNET), ("layer_with_norm", WITH_NORM), ("point", SWEEPS)):
        if name in metafunc.fixturenames:
            measured = [shrunk(layer) if quick else layer for layer in layers]
            metafunc.parametrize(name, measured, ids=[str(layer) for layer in layers], scope="session")


def workload(op: str, layer: Layer) -> Workload:
    """``x, weight, bias, a, c`` of an R-PKN layer, and what arrives for its results.

    A forward must read ``x`` and the weight and write ``y``, and for a backward the sums. That one reads ``x``, the
    weight, the sums and the gradient of ``y``, and writes the gradients of ``x`` and of the weight.
    """
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(layer.images, layer.channels, layer.size, layer.size, generator=numbers)
    fan_in = layer.channels * layer.window**2
    weight = torch.randn(layer.filters, layer.channels, layer.window, layer.window, generator=numbers) / fan_in**0.5
    bias = 0.1 * torch.randn(layer.filters, generator=numbers)
    x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))
    y = torch.randn(layer.images, layer.filters, layer.size, layer.size, generator=numbers)
    y = y.contiguous(memory_format=torch.channels_last)
    gradients = (y, torch.randn(layer.images, generator=numbers)) if op.endswith("_dreg") else (y,)
    read, written, taps = 4 * x.numel(), 4 * y.numel(), 4 * weight.numel()
    arguments = (x, weight, bias, torch.tensor(0.009), torch.tensor(0.47))
    product = 2 * y.numel() * fan_in
    return Workload(
        op,
        str(layer),
        arguments,
        gradients,
        read + taps + written,
        2 * (read + taps + written),
        product,
        2 * product,
        layer.sweep,
        layer.position,
        layer.model,
        compiled=op == "polynomial_conv2d",
        saved_bytes=written,
    )


def _padding(weight: Tensor) -> int:
    return weight.shape[2] // 2


def fused(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return ck.polynomial_conv2d(x, weight, bias, ck.coefficients.pkn(a, c, 2), padding=_padding(weight))


def fused_dreg(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return ck.polynomial_conv2d_dreg(x, weight, bias, ck.coefficients.pkn(a, c, 2), padding=_padding(weight))


def convolution(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=_padding(weight))


def eager(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return a * (F.conv2d(x, weight, bias, padding=_padding(weight)) + c) ** 2


def eager_dreg(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    padding = _padding(weight)
    shifted = F.conv2d(x, weight, bias, padding=padding) + c
    taps = F.conv2d(torch.ones_like(x[:1, :1]), weight.square().sum(1, keepdim=True), padding=padding)
    return a * shifted**2, ((2 * a * shifted).square() * taps).sum((1, 2, 3))


def unfolded(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, c: Tensor) -> Tensor:
    patches = F.unfold(x, weight.shape[2:], padding=_padding(weight))
    sums = patches.transpose(1, 2).matmul(weight.flatten(1).t()).transpose(1, 2) + bias[:, None]
    return F.fold(a * (sums + c) ** 2, x.shape[2:], (1, 1))


def _providers(work: Workload, layer: Layer, stage: str) -> list[Provider]:
    with_norm = work.op.endswith("_dreg")
    plain = eager_dreg if with_norm else eager
    exact = output_and_gradients(plain, work.in_float64(), stage)
    alone = replace(work, gradients=work.gradients[:1])
    rows_first = replace(work, arguments=(work.arguments[0].contiguous(), *work.arguments[1:]))
    alone_exact = output_and_gradients(convolution, alone.in_float64(), stage)
    found = [*copies(work, stage), provider("F.conv2d", convolution, alone, stage, alone_exact)]
    if not with_norm and layer.sweep is None:
        found.append(provider("unfold", unfolded, rows_first, stage, exact))
    found.append(provider("eager", plain, work, stage, exact))
    found.append(compile_provider(plain, work, stage, exact))
    found.append(provider("fused", fused_dreg if with_norm else fused, work, stage, exact))
    return found


def test_polynomial_conv2d(compare: Callable[..., None], layer: Layer, stage: str) -> None:
    work = workload("polynomial_conv2d", layer)
    compare(work, stage, _providers(work, layer, stage))


def test_with_norm(compare: Callable[..., None], layer_with_norm: Layer, stage: str) -> None:
    work = workload("polynomial_conv2d_dreg", layer_with_norm)
    compare(work, stage, _providers(work, layer_with_norm, stage))


def test_over_batches_and_channels(compare: Callable[..., None], point: Layer, sweep_stage: str) -> None:
    work = workload("polynomial_conv2d", point)
    compare(work, sweep_stage, _providers(work, point, sweep_stage))

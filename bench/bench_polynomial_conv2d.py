"""Polynomial-kernel convolution at the layers of a ResNet: R-PKN ``a (conv(x, W) + b + c)²`` (arXiv 2312.15229).

Beside it the library's convolution alone, the same in eager PyTorch and under ``torch.compile``, and the published way:
every patch of the image unfolded, a matrix product, a power. Images are ``torch.channels_last``, but for the unfolded,
which has no use for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import chainzrule_kernels as ck
from bench import measure
from bench.providers import Provider, compiled, output_and_gradients, provider
from bench.workloads import Workload

BATCH = 16


@dataclass(frozen=True)
class Layer:
    """A convolution: ``images`` of ``channels`` to ``filters`` of the same ``size`` in both dimensions, stride 1."""

    channels: int
    filters: int
    size: int
    window: int
    images: int = BATCH

    def __str__(self) -> str:
        taps = f"{self.window}x{self.window}"
        return f"{self.images}x{self.channels}x{self.size}x{self.size}, {taps} to {self.filters}"


RESNET = (
    Layer(64, 64, 56, 3),
    Layer(128, 128, 28, 3),
    Layer(256, 256, 14, 3),
    Layer(512, 512, 7, 3),
    Layer(64, 256, 56, 1),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layer" in metafunc.fixturenames:
        quick = metafunc.config.getoption("quick")
        layers = [replace(layer, channels=8, filters=8, size=7, images=2) if quick else layer for layer in RESNET]
        metafunc.parametrize("layer", layers, ids=[str(layer) for layer in RESNET], scope="session")


def workload(op: str, layer: Layer) -> Workload:
    """``x, weight, bias, a, c`` of an R-PKN layer, and what arrives for its results."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(layer.images, layer.channels, layer.size, layer.size, generator=numbers)
    fan_in = layer.channels * layer.window**2
    weight = torch.randn(layer.filters, layer.channels, layer.window, layer.window, generator=numbers) / fan_in**0.5
    bias = 0.1 * torch.randn(layer.filters, generator=numbers)
    x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))
    y = torch.randn(layer.images, layer.filters, layer.size, layer.size, generator=numbers)
    y = y.contiguous(memory_format=torch.channels_last)
    gradients = (y, torch.randn(layer.images, generator=numbers)) if op.endswith("_dreg") else (y,)
    read, written = 4 * x.numel(), 4 * y.numel()
    arguments = (x, weight, bias, torch.tensor(0.009), torch.tensor(0.47))
    return Workload(op, str(layer), arguments, gradients, read + written, 2 * read + 2 * written)


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


def _providers(op: str, layer: Layer, stage: str) -> list[Provider]:
    work = workload(op, layer)
    with_norm = op.endswith("_dreg")
    plain = eager_dreg if with_norm else eager
    exact = output_and_gradients(plain, work.in_float64(), stage)
    alone = replace(work, gradients=work.gradients[:1])
    rows_first = replace(work, arguments=(work.arguments[0].contiguous(), *work.arguments[1:]))
    found = [
        provider("F.conv2d", convolution, alone, stage, output_and_gradients(convolution, alone.in_float64(), stage))
    ]
    if not with_norm:
        found.append(provider("unfold", unfolded, rows_first, stage, exact))
    found.append(provider("eager", plain, work, stage, exact))
    found.append(provider("compile", compiled(plain, work), work, stage, exact))
    found.append(provider("fused", fused_dreg if with_norm else fused, work, stage, exact))
    return found


@pytest.mark.parametrize("op", ["polynomial_conv2d", "polynomial_conv2d_dreg"])
def test_polynomial_conv2d(compare: Callable[..., None], op: str, layer: Layer, stage: str) -> None:
    compare(op, str(layer), stage, _providers(op, layer, stage))


def test_peak_memory_of_a_training_step(remember: Callable[[measure.Comparison], None], layer: Layer) -> None:
    comparison = measure.Comparison("polynomial_conv2d", str(layer), "memory")
    for one in _providers("polynomial_conv2d", layer, "both"):
        comparison.peak_bytes[one.name] = measure.peak_allocation(partial(one.run, one.prepare()))
    remember(comparison)

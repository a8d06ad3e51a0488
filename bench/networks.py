"""Networks of plain PyTorch, of a few sizes, to train in benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chainzrule_kernels as ck
from bench.workloads import Size

CLASSES = 10

Example = tuple[nn.Module, Tensor, Tensor]
"""A network, a batch of inputs, and the class of each sample."""


def chainzrule(size: Size, depth: int = 2) -> Example:
    """Some layers with cubics, one for each channel, and a linear one."""
    model = ck.nn.ChainzRuleNet((size.channels // 4, *depth * [size.channels], CLASSES), per_channel=True)
    return model, torch.randn(size.rows, size.channels // 4), torch.randint(CLASSES, (size.rows,))


def perceptron(size: Size) -> Example:
    """The same with GELU."""
    widths = (size.channels // 4, size.channels, size.channels)
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(size.channels, CLASSES))
    return model, torch.randn(size.rows, size.channels // 4), torch.randint(CLASSES, (size.rows,))


class TransformerBlock(nn.Module):
    """Attention and a two-layer GELU perceptron, each behind a layer norm, and a classifier on the mean over tokens.

    The attention is written out: PyTorch's fused one cannot be differentiated twice, which other penalties need.
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(B, T, width)`` to ``(B, classes)``."""
        x = x + self.attention(self.norm_1(x))
        x = x + self.down(F.gelu(self.up(self.norm_2(x))))
        classes: Tensor = self.head(x.mean(1))
        return classes

    def attention(self, x: Tensor) -> Tensor:
        """Full self-attention."""
        batch, tokens, width = x.shape
        parts = self.query_key_value(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        mixed: Tensor = self.projection((weights @ value).transpose(1, 2).reshape(batch, tokens, width))
        return mixed


def transformer(size: Size) -> Example:
    """One block over sequences, with as many tokens in all as ``size`` has rows."""
    batch, width = max(1, size.rows // 128), size.channels // 4
    x = torch.randn(batch, size.rows // batch, width)
    return TransformerBlock(width), x, torch.randint(CLASSES, (batch,))


class ConvolutionalNet(nn.Module):
    """A stem and a residual block of convolutions with ReLU, and a classifier on the mean over positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(B, 3, H, W)`` to ``(B, classes)``."""
        x = self.stem(x).relu()
        x = x + self.second(self.first(x).relu()).relu()
        classes: Tensor = self.head(x.mean((2, 3)))
        return classes


def convolutional(size: Size) -> Example:
    """Images of 32 x 32 or fewer pixels."""
    batch, side = max(1, size.rows // 128), min(32, size.channels // 4)
    return ConvolutionalNet(size.channels // 16), torch.randn(batch, 3, side, side), torch.randint(CLASSES, (batch,))


NETWORKS: dict[str, Callable[[Size], Example]] = {
    "ChainzRule": chainzrule,
    "GELU perceptron": perceptron,
    "transformer block": transformer,
    "convolutional": convolutional,
}

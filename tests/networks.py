"""Networks in plain PyTorch, written as their users write them: for the tests of what works on any model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def perceptron() -> nn.Sequential:
    """A multilayer perceptron of modules, with dropout between and behind."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.1), nn.Linear(6, 5), nn.Dropout(0.0), nn.SiLU(), nn.Linear(5, 3)
    )


class FunctionalPerceptron(nn.Module):
    """The same with functions, tensor methods, and a function in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (
            nn.Linear(4, 6),
            nn.Linear(6, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 3),
        )
        self.activation = F.silu

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x), approximate="tanh")
        x = self.activation(F.dropout(self.second(x), 0.0, self.training))
        return self.last(self.third(x).tanh())


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm; one activation module serves both, in place, and the sum."""

    def __init__(self, inputs: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class ResidualNet(nn.Module):
    """A small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.first = ResidualBlock(3, 3)
        self.second = ResidualBlock(3, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        x = self.second(self.first(x))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(x.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    """Pre-norm attention and a feed-forward part; the activation is a function or a module."""

    def __init__(self, width: int, heads: int, causal: bool, module: nn.Module | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act = module

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        hidden = self.fc1(self.norm2(x))
        hidden = F.gelu(hidden, approximate="tanh") if self.act is None else self.act(hidden)
        return x + self.fc2(hidden)


class VisionTransformer(nn.Module):
    """Patches by a convolution, two blocks, and the mean over the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 4, 2, stride=2)
        self.position = nn.Parameter(0.1 * torch.randn(1, 4, 4))
        self.blocks = nn.ModuleList([TransformerBlock(4, 2, False, nn.GELU()) for _ in range(2)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class LanguageModel(nn.Module):
    """Token and position embeddings, two causal blocks that call their activation as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 8
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(self.length, 4)
        self.blocks = nn.ModuleList([TransformerBlock(4, 2, True, None) for _ in range(2)])
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.length:
            raise ValueError(f"tokens: expected at most {self.length}, got {length}")
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def vectors(count: int = 5) -> Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def tokens(count: int = 3) -> Tensor:
    return torch.randint(7, (count, 5), generator=torch.Generator().manual_seed(count))


# Each network with its inputs, and the names of its layers: (of the layer, of its linear map).
NETWORKS = {
    "perceptron": (perceptron, vectors, [("1", "0"), ("5", "3")]),
    "functional perceptron": (
        FunctionalPerceptron,
        vectors,
        [("gelu behind first", "first"), ("silu behind second", "second"), ("tanh behind third", "third")],
    ),
    "residual net": (
        ResidualNet,
        images,
        [
            ("relu behind stem.0", "stem.0"),
            ("first.relu behind first.conv1", "first.conv1"),
            ("second.relu behind second.conv1", "second.conv1"),
        ],
    ),
    "vision transformer": (
        VisionTransformer,
        images,
        [("blocks.0.act", "blocks.0.fc1"), ("blocks.1.act", "blocks.1.fc1")],
    ),
    "language model": (
        LanguageModel,
        tokens,
        [("gelu behind blocks.0.fc1", "blocks.0.fc1"), ("gelu behind blocks.1.fc1", "blocks.1.fc1")],
    ),
}

"""Other libraries that do the nearest job, where they are installed: ``pip install --no-deps liger-kernel torchortho``.

Without their dependencies, because one of these asks for another PyTorch than the one that is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

POLY_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Peer:
    """A function of another library.

    Attributes:
        name: as a provider.
        package: as ``pip`` knows it.
        module: as Python imports it.
        function: imports the library and returns the function of the workload's arguments.
        needs_gpu: whether its kernels run on a GPU alone.
        definition: what it computes, in plain PyTorch, where that differs from what the workload does.
        arguments_of: from the workload's first argument to those of a peer that has a definition of its own.
    """

    name: str
    package: str
    module: str
    function: Callable[[], Callable[..., Any]]
    needs_gpu: bool = False
    definition: Callable[..., Any] | None = None
    arguments_of: Callable[[Tensor], tuple[Any, ...]] = lambda z: (z,)

    def missing_because(self, device: str = "cpu") -> str | None:
        """Why it cannot be measured on a device, or None."""
        if find_spec(self.module) is None:
            return f"{self.package} is not installed"
        if self.needs_gpu and device == "cpu":
            return f"the kernels of {self.package} are written in Triton and need a GPU"
        return None


def _liger_relu_squared() -> Callable[..., Any]:
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    return LigerReLUSquaredFunction.apply


def _liger_poly_norm() -> Callable[..., Any]:
    from liger_kernel.ops.poly_norm import LigerPolyNormFunction

    def poly_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Not in place: its default writes the gradient of z over that of y, which the caller still needs here.
        normed: Tensor = LigerPolyNormFunction.apply(z, weight, bias, POLY_NORM_EPSILON, False)
        return normed

    return poly_norm


def poly_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``Σ_k w_k norm(z^k) + b`` for the powers 3, 2, 1, with ``norm(u) = u / sqrt(mean u² + ε)`` (arXiv 2411.03884)."""

    def normed(u: Tensor) -> Tensor:
        return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + POLY_NORM_EPSILON)

    y: Tensor = weight[0] * normed(z**3) + weight[1] * normed(z**2) + weight[2] * normed(z) + bias
    return y


def _poly_norm_arguments(z: Tensor) -> tuple[Tensor, ...]:
    """PolyNorm's initial weights and bias."""
    return z, torch.full((3,), 1 / 3, device=z.device), torch.ones((), device=z.device)


def _torchortho_hermite() -> Callable[..., Any]:
    from torchortho import HermiteActivation

    def hermite(z: Tensor, a: Tensor) -> Tensor:
        activation = modules.setdefault(len(a) - 1, HermiteActivation(len(a) - 1).to(z.device))
        y: Tensor = torch.func.functional_call(activation, {"coefficients": a}, (z,))
        return y

    modules: dict[int, Any] = {}
    return hermite


LIGER_RELU_SQUARED = Peer("Liger relu²", "liger-kernel", "liger_kernel", _liger_relu_squared, needs_gpu=True)
LIGER_POLY_NORM = Peer(
    "Liger PolyNorm",
    "liger-kernel",
    "liger_kernel",
    _liger_poly_norm,
    needs_gpu=True,
    definition=poly_norm,
    arguments_of=_poly_norm_arguments,
)
TORCHORTHO_HERMITE = Peer("torchortho", "torchortho", "torchortho", _torchortho_hermite)

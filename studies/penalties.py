"""The six regularisers that are compared, each as what it changes of the network, the optimizer and the loss.

One strength λ serves all that have one, 10^-2.5 in arXiv 2606.23942; dropout and spectral normalisation have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chainzrule_kernels as ck
from studies.networks import network

NONE = "none"
DREG = "DREG"
DREG_PLAIN = "DREG, plain PyTorch"
"""The penalty of :data:`DREG` written in PyTorch's own operations, to compare times with."""
REGULARISERS = ("weight decay", "dropout", "spectral norm", "input gradient", "projected Jacobian", DREG)

STRENGTH = 10**-2.5
DROPOUT = 0.1

Objective = Callable[[Tensor, Tensor], Tensor]
"""From inputs and targets of a batch to the loss with its penalty."""


@dataclass(frozen=True)
class Learner:
    """A network, the loss it minimises, and the weight decay that its optimizer applies."""

    model: nn.Module
    objective: Objective
    weight_decay: float = 0.0


def learner(sizes: Sequence[int], activation: str, regulariser: str, seed: int, strength: float = STRENGTH) -> Learner:
    """A network with a regulariser; the global generator is seeded, and is what dropout draws from.

    ========================  =======================================================================================
    weight decay              ``λ Σ ‖W‖_F²`` over the weights, through the optimizer
    dropout                   probability 0.1 behind each activation
    spectral norm             each weight divided by its largest singular value (arXiv 1802.05957)
    input gradient            ``λ mean ‖∂ℓ/∂x‖²`` (arXiv 1711.09404), double backward
    projected Jacobian        ``λ mean ‖∂y/∂x‖_F²`` by one random projection (arXiv 1908.02729), double backward
    DREG                      ``λ Σ_layers mean ‖J‖_F²`` (arXiv 2606.23942), by the fused ops
    ========================  =======================================================================================

    Args:
        sizes: of :func:`studies.networks.network`.
        activation: likewise.
        regulariser: one of :data:`REGULARISERS`, :data:`NONE` or :data:`DREG_PLAIN`.
        seed: of the parameters, the dropout and the projections.
        strength: λ.

    Raises:
        ValueError: for another regulariser or activation.
    """
    torch.manual_seed(seed)
    if regulariser == "dropout":
        model = network(sizes, activation, dropout=DROPOUT)
    else:
        model = network(sizes, activation, spectral_norm=regulariser == "spectral norm")
    if regulariser in (NONE, "dropout", "spectral norm", "weight decay"):
        decay = 2 * strength if regulariser == "weight decay" else 0.0
        return Learner(model, lambda x, target: F.cross_entropy(model(x), target), decay)
    objectives: dict[str, Callable[[nn.Module, float], Objective]] = {
        "input gradient": _input_gradient,
        "projected Jacobian": _projected_jacobian,
        DREG: _fused_dreg,
        DREG_PLAIN: _plain_dreg,
    }
    if regulariser not in objectives:
        expected = ", ".join((NONE, *REGULARISERS, DREG_PLAIN))
        raise ValueError(f"regulariser: expected one of {expected}, got {regulariser!r}")
    return Learner(model, objectives[regulariser](model, strength))


def _input_gradient(model: nn.Module, strength: float) -> Objective:
    def objective(x: Tensor, target: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        losses = F.cross_entropy(model(x), target, reduction="none")
        return losses.mean() + strength * ck.regularisers.input_gradient_penalty(losses, x)

    return objective


def _projected_jacobian(model: nn.Module, strength: float) -> Objective:
    def objective(x: Tensor, target: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        outputs = model(x)
        penalty = ck.regularisers.projected_jacobian_penalty(outputs, x)
        return F.cross_entropy(outputs, target) + strength * penalty

    return objective


def _fused_dreg(model: nn.Module, strength: float) -> Objective:
    regulariser = ck.DREG(model, strength=strength)

    def objective(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model(x), target) + regulariser.penalty()

    return objective


def _plain_dreg(model: nn.Module, strength: float) -> Objective:
    """As one writes it without this package: each derivative by its formula, the penalty differentiated by autograd."""
    layers: list[Any] = list(model.children())

    def objective(x: Tensor, target: Tensor) -> Tensor:
        penalty = x.new_zeros(())
        position = 0
        while position < len(layers) - 1:
            layer = layers[position]
            z = F.linear(x, layer.weight, layer.bias)
            if isinstance(layer, ck.nn.PolynomialLinear):
                x, slope = _cubic(z, layer.coeffs)
                position += 1
            else:
                x, slope = _WITH_SLOPE[type(layers[position + 1])](z)
                position += 2
            penalty = penalty + (slope.square() @ layer.weight.square().sum(1)).mean()
        return F.cross_entropy(layers[-1](x), target) + strength * penalty

    return objective


def _cubic(z: Tensor, coeffs: Tensor) -> tuple[Tensor, Tensor]:
    c0, c1, c2, c3 = coeffs.unbind()
    return c0 + c1 * z + c2 * z**2 + c3 * z**3, c1 + 2 * c2 * z + 3 * c3 * z**2


def _relu(z: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(z), (z > 0).to(z.dtype)


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    distribution = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return z * distribution, distribution + z * density


def _tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(z)
    return y, 1 - y**2


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(z)
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


_WITH_SLOPE: dict[type[nn.Module], Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    nn.ReLU: _relu,
    nn.GELU: _gelu,
    nn.Tanh: _tanh,
    nn.SiLU: _silu,
}

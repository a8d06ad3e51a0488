"""A training step of several networks: with DREG, without, and with the penalties that DREG replaces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import chainzrule_kernels as ck
from bench import measure
from bench.networks import CLASSES, NETWORKS, Example, chainzrule
from bench.providers import Provider, disagreement
from bench.workloads import Size

STRENGTH = 10**-2.5
# Gradients come through several layers here, so that rounding has more room to grow than in one op.
TOLERANCE = 1e-3

# 64 images in the place of 16: what DREG adds for each layer, whatever its size, then counts for less.
MORE_IMAGES = Size("64 images", 8192, 1024)

DEPTHS = (1, 2, 4, 8)
DEPTH_SIZE = Size("depth sweep", 512, 256)
BATCHES = tuple(Size("batch sweep", rows, 256, sweep="batch") for rows in (256, 512, 1024, 2048))

Penalty = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the input, the output and the loss of each sample to a term of the loss."""


def no_penalty(x: Tensor, output: Tensor, losses: Tensor) -> Tensor:
    return output.new_zeros(())


def input_gradient(x: Tensor, output: Tensor, losses: Tensor) -> Tensor:
    """The squared gradient of each sample's loss at its input."""
    return STRENGTH * ck.regularisers.input_gradient_penalty(losses, x)


def double_backward(x: Tensor, output: Tensor, losses: Tensor, projection: Tensor) -> Tensor:
    """``‖Jᵀ v‖²`` of the whole net for one projection ``v``, through ``create_graph`` (arXiv 1908.02729).

    As :func:`chainzrule_kernels.regularisers.projected_jacobian_penalty`, with a ``v`` that is the same in float64.
    """
    (along,) = torch.autograd.grad(output, x, projection.to(output), create_graph=True)
    return STRENGTH * along.flatten(1).square().sum(-1).mean()


class Step:
    """Forward, backward and optimiser of a net of its own."""

    def __init__(self, example: Example, penalty: Penalty | None) -> None:
        """``penalty`` None is DREG."""
        model, x, self.target = example
        self.model = copy.deepcopy(model)
        self.x = x.detach().requires_grad_(penalty not in (None, no_penalty))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        if penalty is None:
            regulariser = ck.DREG(self.model, strength=STRENGTH)
            self.penalty: Penalty = lambda x, output, losses: regulariser.penalty()
        else:
            self.penalty = penalty

    def __call__(self, _: Any = None) -> list[Tensor]:
        """One step; returns the loss and the gradients."""
        self.optimizer.zero_grad()
        output = self.model(self.x)
        losses = F.cross_entropy(output, self.target, reduction="none")
        loss = losses.mean() + self.penalty(self.x, output, losses)
        loss.backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.step()
        return [loss.detach(), *gradients]


def example_and_penalties(network: str, size: Size, depth: int = 2) -> tuple[Example, dict[str, Penalty | None]]:
    """``depth`` is that of the ChainzRule net."""
    torch.manual_seed(0)
    model, x, target = chainzrule(size, depth) if network == "ChainzRule" else NETWORKS[network](size)
    projection = F.normalize(torch.randn(len(x), CLASSES), dim=-1)
    penalties: dict[str, Penalty | None] = {
        "without DREG": no_penalty,
        "input gradient": input_gradient,
        "double backward": partial(double_backward, projection=projection),
        "fused": None,
    }
    return (model, x, target), penalties


def in_double(example: Example) -> Example:
    model, x, target = example
    return copy.deepcopy(model).double(), x.double(), target


def label_of(network: str, size: Size) -> str:
    # The bounds speak of the first one.
    return str(size) if network == "ChainzRule" else f"{size}, {network}"


def providers_of(example: Example, penalties: dict[str, Penalty | None]) -> list[Provider]:
    """A step with each penalty; DREG once more with every op in plain PyTorch, and fused."""
    providers = []
    for name, penalty in penalties.items():
        with ck.backend("reference"):
            exact = Step(in_double(example), penalty)()
        check = partial(disagreement, exact=exact, tolerance=TOLERANCE)
        if penalty is None:
            providers.append(Provider("eager", partial(in_plain_pytorch, Step(example, penalty)), check=check))
        providers.append(Provider(name, Step(example, penalty), check=check))
    return providers


def in_plain_pytorch(step: Step, _: Any = None) -> list[Tensor]:
    with ck.backend("reference"):
        return step()


@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(compare: Callable[..., None], main_size: Size, network: str) -> None:
    example, penalties = example_and_penalties(network, main_size)
    comparison = measure.Comparison("training step", label_of(network, main_size), "both", model=network)
    compare(comparison, providers_of(example, penalties))


def test_convolutional_step_of_more_images(compare: Callable[..., None], shrunk: Callable[[Size], Size]) -> None:
    size = shrunk(MORE_IMAGES)
    example, penalties = example_and_penalties("convolutional", size)
    comparison = measure.Comparison("training step", label_of("convolutional", size), "both", model="convolutional")
    compare(comparison, providers_of(example, only_dreg(penalties)))


def only_dreg(penalties: dict[str, Penalty | None]) -> dict[str, Penalty | None]:
    """The step without a penalty and the one with DREG: what a sweep measures."""
    return {name: penalties[name] for name in ("without DREG", "fused")}


def operations_of_products(example: Example) -> int:
    """Of the matrix products of a step: one for each layer's output, its weight's gradient and its input's.

    The first layer is narrower and its input needs no gradient, so that they do not go as the depth.
    """
    model, x, _ = example
    weights = [parameter.numel() for name, parameter in model.named_parameters() if name.endswith("weight")]
    return 2 * len(x) * (3 * sum(weights) - weights[0])


@pytest.mark.parametrize("depth", DEPTHS)
def test_over_depths(compare: Callable[..., None], shrunk: Callable[[Size], Size], depth: int) -> None:
    size = shrunk(DEPTH_SIZE)
    example, penalties = example_and_penalties("ChainzRule", size, depth)
    comparison = measure.Comparison(
        "training step",
        f"{size}, depth {depth}",
        "both",
        operations=operations_of_products(example),
        sweep="depth",
        position=depth,
    )
    compare(comparison, providers_of(example, only_dreg(penalties)))


@pytest.mark.parametrize("point", BATCHES, ids=str)
def test_over_batches(compare: Callable[..., None], shrunk: Callable[[Size], Size], point: Size) -> None:
    size = shrunk(point)
    example, penalties = example_and_penalties("ChainzRule", size)
    comparison = measure.Comparison(
        "training step",
        str(size),
        "both",
        operations=operations_of_products(example),
        sweep=size.sweep,
        position=size.position,
    )
    compare(comparison, providers_of(example, only_dreg(penalties)))

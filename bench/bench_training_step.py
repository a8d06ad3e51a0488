"""A training step of a ChainzRule net: with DREG, without, and with the penalty that DREG replaces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chainzrule_kernels as ck
from bench import measure
from bench.providers import Provider, disagreement
from bench.workloads import Size

STRENGTH = 10**-2.5
CLASSES = 10
# Gradients come through three layers here, so that rounding has more room to grow than in one op.
TOLERANCE = 1e-3

Penalty = Callable[[nn.Module, Tensor, Tensor], Tensor]


def no_penalty(model: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    return output.new_zeros(())


def double_backward(model: nn.Module, x: Tensor, output: Tensor, projection: Tensor) -> Tensor:
    """``‖Jᵀ v‖²`` of the whole net for one projection ``v``, through ``create_graph`` (arXiv 1908.02729)."""
    (along,) = torch.autograd.grad(output, x, projection.to(output), create_graph=True)
    return STRENGTH * along.square().sum(-1).mean()


class Step:
    """Forward, backward and optimiser of a net of its own."""

    def __init__(self, model: nn.Module, data: tuple[Tensor, Tensor], penalty: Penalty | None) -> None:
        """``penalty`` None is DREG."""
        self.model = copy.deepcopy(model)
        self.x, self.target = data
        self.x = self.x.detach().requires_grad_(isinstance(penalty, partial))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        if penalty is None:
            regulariser = ck.DREG(self.model, strength=STRENGTH)
            self.penalty: Penalty = lambda model, x, output: regulariser.penalty()
        else:
            self.penalty = penalty

    def __call__(self, _: Any = None) -> list[Tensor]:
        """One step; returns the loss and the gradients."""
        self.optimizer.zero_grad()
        output = self.model(self.x)
        loss = F.cross_entropy(output, self.target) + self.penalty(self.model, self.x, output)
        loss.backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.step()
        return [loss.detach(), *gradients]


def _net(size: Size) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = ck.nn.ChainzRuleNet((size.channels // 4, size.channels, size.channels, CLASSES), per_channel=True)
    x = torch.randn(size.rows, size.channels // 4)
    return model, (x, torch.randint(CLASSES, (size.rows,)))


def test_training_step(compare: Callable[..., None], main_size: Size) -> None:
    model, (x, target) = _net(main_size)
    penalties: dict[str, Penalty | None] = {
        "without DREG": no_penalty,
        "double backward": partial(double_backward, projection=torch.randn(main_size.rows, CLASSES)),
        "fused": None,
    }
    providers = []
    for name, penalty in penalties.items():
        with ck.backend("reference"):
            exact = Step(model.double(), (x.double(), target), penalty)()
        model.float()
        check = partial(disagreement, exact=exact, tolerance=TOLERANCE)
        providers.append(Provider(name, Step(model, (x, target), penalty), check=check))
    compare("training step", str(main_size), "both", providers)


def test_memory(remember: Callable[..., None], main_size: Size) -> None:
    model, data = _net(main_size)

    def eager() -> None:
        with ck.backend("reference"):
            step()

    step = Step(model, data, None)
    peak_bytes = {"eager": measure.peak_allocation(eager), "fused": measure.peak_allocation(step)}
    remember(measure.Comparison("training step", str(main_size), "memory", peak_bytes=peak_bytes))

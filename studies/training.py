"""Training on small data: the data are tensors as a whole, a batch is an index, everything random has its seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.penalties import Learner


@dataclass(frozen=True)
class Settings:
    """What determines a training beside the data and the learner.

    Attributes:
        steps: of the optimizer, Adam.
        batch: samples of a step; all of them where there are fewer. The last, smaller batch of an epoch is left out.
        learning_rate: at the start.
        decays: whether it falls to zero over the steps by half a cosine.
        gradient_norms: whether the history has the norm of the gradient of all parameters at each step.
    """

    steps: int = 500
    batch: int = 64
    learning_rate: float = 3e-3
    decays: bool = True
    gradient_norms: bool = False


@dataclass(frozen=True)
class History:
    """What a training left behind.

    Attributes:
        losses: ``(steps,)``, penalty included.
        gradient_norms: ``(steps,)``, empty where they were not asked for.
        seconds: of the clock.
        process_seconds: of this process on all its processors.
    """

    losses: Tensor
    gradient_norms: Tensor
    seconds: float
    process_seconds: float

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss is not finite; None if there is none."""
        wrong = (~self.losses.isfinite()).nonzero()
        return int(wrong[0]) if len(wrong) else None


class Clock:
    """Measures from when it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds, and those of this process on all its processors, under the names that the stores give them."""
        seconds, process_seconds = self._begin
        return {"seconds": time.perf_counter() - seconds, "process_seconds": time.process_time() - process_seconds}


def train(
    learner: Learner,
    x: Tensor,
    y: Tensor,
    settings: Settings,
    seed: int,
    after_step: Callable[[int], None] | None = None,
) -> History:
    """Train a learner; its model is left in evaluation mode.

    Args:
        learner: from :func:`studies.penalties.learner`.
        x: inputs of the training part, on the device of the model.
        y: their targets.
        settings: of the training.
        seed: of the order of the samples.
        after_step: called with the number of steps taken, behind each; for schedules and for what is measured
            meanwhile. It leaves the model in training mode.
    """
    model = learner.model.train()
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": learner.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], settings.learning_rate, fused=True)
    losses, norms = [], []
    clock = Clock()
    for step, chosen in enumerate(batches(len(x), settings.batch, settings.steps, seed)):
        if settings.decays:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        loss = learner.objective(x[chosen], y[chosen])
        optimizer.zero_grad()
        loss.backward()
        if settings.gradient_norms:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients))
        optimizer.step()
        losses.append(loss.detach())
        if after_step is not None:
            after_step(step + 1)
    model.eval()
    return History(
        torch.stack(losses).cpu(),
        torch.stack(norms).cpu() if norms else torch.empty(0),
        **clock.read(),
    )


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices for each step: one random order after the other, cut into whole batches."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, count)
    given = 0
    while given < steps:
        order = torch.randperm(count, generator=generator)
        for chosen in order[: count // batch * batch].split(batch)[: steps - given]:
            yield chosen
            given += 1

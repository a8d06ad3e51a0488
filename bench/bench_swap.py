"""The feed-forward part of a transformer with its linear layer and GELU swapped for a fused module, and as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chainzrule_kernels as ck
from bench import measure
from bench.providers import Provider, disagreement
from bench.workloads import Size

TOLERANCE = 1e-4


def evaluation(model: nn.Module, x: Tensor, _: Any = None) -> list[Tensor]:
    with torch.no_grad():
        return [model(x)]


def training(model: nn.Module, x: Tensor, _: Any = None) -> list[Tensor]:
    model.zero_grad()
    output = model(x)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


WAYS: dict[str, Callable[..., list[Tensor]]] = {"forward": evaluation, "both": training}


def plain_and_swapped(size: Size) -> tuple[dict[str, nn.Module], Tensor]:
    torch.manual_seed(0)
    width = size.channels // 2
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    x = torch.randn(size.rows, width)
    swapped = copy.deepcopy(model)
    ck.swap(swapped)
    return {"plain": model, "fused": swapped}, x


@pytest.mark.parametrize("way", WAYS)
def test_swap(compare: Callable[..., None], main_size: Size, way: str) -> None:
    models, x = plain_and_swapped(main_size)
    work = WAYS[way]
    exact = work(copy.deepcopy(models["plain"]).double(), x.double())
    check = partial(disagreement, exact=exact, tolerance=TOLERANCE)
    providers = [Provider(name, partial(work, model, x), check=check) for name, model in models.items()]
    compare(measure.Comparison("swap", f"{main_size}, feed-forward", way), providers)


def test_memory_of_evaluation(remember: Callable[..., None], main_size: Size) -> None:
    models, x = plain_and_swapped(main_size)
    peak_bytes = {name: measure.peak_allocation(partial(evaluation, model, x)) for name, model in models.items()}
    remember(measure.Comparison("swap", f"{main_size}, feed-forward", "memory, forward", peak_bytes=peak_bytes))

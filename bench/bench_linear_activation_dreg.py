"""``linear_activation_dreg``, gelu, at the main size and at the first layer of the MLPs of GPT-2 small and ViT-B."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import workloads
from bench.workloads import Size

# GPT-2 takes the approximation by tanh, ViT the exact one.
MODELS = {"gelu_tanh": workloads.GPT_2, "gelu": workloads.VIT}


def test_linear_activation_dreg(compare: Callable[..., None], main_size: Size, stage: str) -> None:
    compare(workloads.linear_activation_dreg(main_size), stage)


@pytest.mark.parametrize("kind", MODELS)
def test_models(compare: Callable[..., None], shrunk: Callable[[Size], Size], kind: str, stage: str) -> None:
    compare(workloads.linear_activation_dreg(shrunk(MODELS[kind]), kind), stage)

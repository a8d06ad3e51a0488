"""``activation_dreg``, gelu, at the main size and at the MLPs of GPT-2 small and ViT-B."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import workloads
from bench.workloads import Size

# GPT-2 takes the approximation by tanh, ViT the exact one.
MODELS = {"gelu_tanh": workloads.GPT_2, "gelu": workloads.VIT}


def test_activation_dreg(compare: Callable[..., None], main_size: Size, stage: str) -> None:
    compare(workloads.activation_dreg(main_size), stage)


@pytest.mark.parametrize("kind", MODELS)
def test_models(compare: Callable[..., None], shrunk: Callable[[Size], Size], kind: str, stage: str) -> None:
    compare(workloads.activation_dreg(shrunk(MODELS[kind]), kind), stage)

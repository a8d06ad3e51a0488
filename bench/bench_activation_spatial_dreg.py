"""``activation_spatial_dreg``, relu, at the feature maps of ResNet-18's first stage, 16 images."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import workloads

STAGE_1, TINY = (16, 64, 56, 56), (2, 8, 7, 7)


def test_activation_spatial_dreg(compare: Callable[..., None], request: pytest.FixtureRequest, stage: str) -> None:
    shape = TINY if request.config.getoption("quick") else STAGE_1
    compare(workloads.activation_spatial_dreg(shape, "ResNet-18 stage 1, 16 images"), stage)

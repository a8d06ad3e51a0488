"""``activation_dreg`` at the main size."""

from __future__ import annotations

from collections.abc import Callable

from bench import workloads


def test_activation_dreg(compare: Callable[..., None], main_size: workloads.Size, stage: str) -> None:
    compare(workloads.activation_dreg(main_size), stage)

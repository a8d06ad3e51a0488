"""``activation_tangent`` at the main size."""

from __future__ import annotations

from collections.abc import Callable

from bench import workloads


def test_activation_tangent(compare: Callable[..., None], main_size: workloads.Size, stage: str) -> None:
    compare(workloads.activation_tangent(main_size), stage)

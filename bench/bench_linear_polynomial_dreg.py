"""``linear_polynomial_dreg`` at the main size."""

from __future__ import annotations

from collections.abc import Callable

from bench import workloads


def test_linear_polynomial_dreg(compare: Callable[..., None], main_size: workloads.Size, stage: str) -> None:
    compare(workloads.linear_polynomial_dreg(main_size), stage)

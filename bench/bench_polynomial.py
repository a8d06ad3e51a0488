"""``polynomial`` at the main size."""

from __future__ import annotations

from collections.abc import Callable

from bench import workloads


def test_polynomial(compare: Callable[..., None], main_size: workloads.Size, stage: str) -> None:
    compare(workloads.polynomial(main_size), stage)

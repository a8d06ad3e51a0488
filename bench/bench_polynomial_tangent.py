"""``polynomial_tangent`` at the main size, and over the number of tangents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bench import workloads
from bench.workloads import Size


def test_polynomial_tangent(compare: Callable[..., None], main_size: Size, stage: str) -> None:
    compare(workloads.polynomial_tangent(main_size), stage)


@pytest.mark.parametrize("tangents", workloads.TANGENT_SWEEP)
def test_over_tangents(
    compare: Callable[..., None], shrunk: Callable[[Size], Size], tangents: int, sweep_stage: str
) -> None:
    workload = workloads.polynomial_tangent(shrunk(workloads.TANGENT_SIZE), tangents)
    compare(replace(workload, sweep="tangents", position=tangents), sweep_stage)

"""``polynomial_dreg`` at several sizes and real models' shapes; over rows, channels and degrees."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import workloads
from bench.workloads import Size


def test_polynomial_dreg(compare: Callable[..., None], size: Size, stage: str) -> None:
    compare(workloads.polynomial_dreg(size), stage)


def test_shared_coefficients(compare: Callable[..., None], main_size: Size, stage: str) -> None:
    compare(workloads.polynomial_dreg(main_size, shared=True), stage)


@pytest.mark.parametrize("model", [workloads.GPT_2, workloads.CHAINZRULE], ids=str)
def test_models(compare: Callable[..., None], shrunk: Callable[[Size], Size], model: Size, stage: str) -> None:
    compare(workloads.polynomial_dreg(shrunk(model)), stage)


@pytest.mark.parametrize("point", [*workloads.BATCH_SWEEP, *workloads.WIDTH_SWEEP], ids=str)
def test_over_sizes(
    compare: Callable[..., None], shrunk: Callable[[Size], Size], point: Size, sweep_stage: str
) -> None:
    compare(workloads.polynomial_dreg(shrunk(point)), sweep_stage)


@pytest.mark.parametrize("degree", workloads.DEGREE_SWEEP)
def test_over_degrees(
    compare: Callable[..., None], shrunk: Callable[[Size], Size], degree: int, sweep_stage: str
) -> None:
    compare(workloads.polynomial_dreg_of_degree(degree, shrunk(workloads.DEGREE_SIZE)), sweep_stage)

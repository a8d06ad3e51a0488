"""``linear_polynomial_dreg`` at the main size and at a small ChainzRule net."""

from __future__ import annotations

from collections.abc import Callable

from bench import workloads
from bench.workloads import Size


def test_linear_polynomial_dreg(compare: Callable[..., None], main_size: Size, stage: str) -> None:
    compare(workloads.linear_polynomial_dreg(main_size), stage)


def test_small_net(compare: Callable[..., None], shrunk: Callable[[Size], Size], stage: str) -> None:
    compare(workloads.linear_polynomial_dreg(shrunk(workloads.CHAINZRULE)), stage)

"""The benchmark session: sizes, the fixture that compares providers, and the tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from bench import measure, record
from bench.providers import STAGES, SWEEP_STAGES, Provider, missing, providers_of
from bench.suites import RESULTS
from bench.workloads import MAIN, SIZES, Size, Workload

SECONDS = 0.7
SECONDS_IN_A_SWEEP = 0.4
SECONDS_WHEN_QUICK = 0.02

COMPILED_WHEN_QUICK = ("polynomial_dreg",)
"""The ops whose ``torch.compile`` is measured with ``--quick``: compiling takes a few seconds whatever the size."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes and few rounds: to see that everything runs")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}
    # pytest-benchmark's own table knows only the fused provider.
    config.option.benchmark_quiet = True


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", [tiny(size) if quick else size for size in SIZES], ids=str, scope="session")
    if "main_size" in metafunc.fixturenames:
        metafunc.parametrize("main_size", [tiny(MAIN) if quick else MAIN], ids=str, scope="session")
    # The stages come last, so that those of one workload follow each other and share its compiled code.
    if "stage" in metafunc.fixturenames:
        metafunc.parametrize("stage", STAGES)
    if "sweep_stage" in metafunc.fixturenames:
        metafunc.parametrize("sweep_stage", SWEEP_STAGES)


def tiny(size: Size) -> Size:
    """The same size, hundreds of times smaller."""
    inputs = None if size.inputs is None else max(16, size.inputs // 16)
    return replace(size, rows=max(8, size.rows // 32), channels=max(16, size.channels // 16), inputs=inputs)


@pytest.fixture
def shrunk(request: pytest.FixtureRequest) -> Callable[[Size], Size]:
    """From a size to the one to measure: itself, or with ``--quick`` a tiny one."""
    return tiny if request.config.getoption("quick") else lambda size: size


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """``compare(workload, stage)`` measures an op, ``compare(workload, stage, providers)`` with providers of its own.

    ``compare(comparison, providers)`` measures anything else.
    """
    quick = request.config.getoption("quick")

    def work(what: Workload | measure.Comparison, *rest: Any) -> None:
        providers: Sequence[Provider]
        if isinstance(what, Workload):
            stage = rest[0]
            comparison = comparison_of(what, stage)
            providers = rest[1] if len(rest) > 1 else providers_of(what, stage)
        else:
            comparison, (providers,) = what, rest
        if quick and comparison.op not in COMPILED_WHEN_QUICK:
            because = f"--quick compiles {', '.join(COMPILED_WHEN_QUICK)} only"
            providers = [missing(one.name, because) if one.name == "compile" else one for one in providers]
        request.config.stash[RESULTS][comparison.op, comparison.label, comparison.stage] = comparison
        seconds = SECONDS if comparison.sweep is None else SECONDS_IN_A_SWEEP
        measure.compare(comparison, providers, benchmark, SECONDS_WHEN_QUICK if quick else seconds)

    return work


def comparison_of(workload: Workload, stage: str) -> measure.Comparison:
    """What is known of a stage of a workload before it is measured."""
    return measure.Comparison(
        workload.op,
        workload.label,
        stage,
        bytes=workload.bytes_at(stage),
        operations=workload.operations_at(stage),
        sweep=workload.sweep,
        position=workload.position,
        model=workload.model,
    )


@pytest.fixture
def remember(request: pytest.FixtureRequest) -> Callable[[measure.Comparison], None]:
    """Keep a comparison that was measured by other means than a clock."""

    def work(comparison: measure.Comparison) -> None:
        request.config.stash[RESULTS][comparison.op, comparison.label, comparison.stage] = comparison

    return work


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if results:
        terminalreporter.section("benchmarks")
        record.show(record.as_json(results, config.getoption("quick")), whole=False)

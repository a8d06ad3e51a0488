"""The benchmark session: sizes, the fixture that compares providers, and the tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import measure, record
from bench.providers import STAGES, Provider, providers_of
from bench.workloads import MAIN, SIZES, Size, Workload

RESULTS = pytest.StashKey[dict[tuple[str, str, str], measure.Comparison]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes and few rounds: to see that everything runs")
    parser.addoption("--results", default=str(Path(__file__).parent / "results"), help="where the JSON file goes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}
    # pytest-benchmark's own table knows only the fused provider.
    config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", [tiny(size) if quick else size for size in SIZES], ids=str, scope="session")
    if "main_size" in metafunc.fixturenames:
        metafunc.parametrize("main_size", [tiny(MAIN) if quick else MAIN], ids=str, scope="session")
    # The stages come last, so that those of one workload follow each other and share its compiled code.
    if "stage" in metafunc.fixturenames:
        metafunc.parametrize("stage", STAGES)


def tiny(size: Size) -> Size:
    """The same size, a hundred times smaller."""
    return replace(size, rows=max(8, size.rows // 32), channels=max(16, size.channels // 16))


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """``compare(workload, stage)`` measures an op; ``compare(op, label, stage, providers)`` anything else."""
    seconds = 0.02 if request.config.getoption("quick") else 2.5

    def work(op: str | Workload, *rest: Any) -> None:
        if isinstance(op, Workload):
            (stage,) = rest
            comparison = measure.Comparison(op.op, op.label, stage)
            providers: Sequence[Provider] = providers_of(op, stage)
        else:
            label, stage, providers = rest
            comparison = measure.Comparison(op, label, stage)
        request.config.stash[RESULTS][comparison.op, comparison.label, comparison.stage] = comparison
        measure.compare(comparison, providers, benchmark, seconds)

    return work


@pytest.fixture
def remember(request: pytest.FixtureRequest) -> Callable[[measure.Comparison], None]:
    """Keep a comparison that was measured by other means than a clock."""

    def work(comparison: measure.Comparison) -> None:
        request.config.stash[RESULTS][comparison.op, comparison.label, comparison.stage] = comparison

    return work


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    quick = config.getoption("quick")
    terminalreporter.section("benchmarks")
    for line in record.lines(results):
        terminalreporter.write_line(line)
    terminalreporter.write_line("")
    if quick:
        terminalreporter.write_line("Tiny sizes: these figures say only that everything runs. No file is written.")
        return
    terminalreporter.write_line(f"written to {record.write(results, Path(config.getoption('results')), quick)}")

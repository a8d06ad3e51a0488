"""The suites, one for each ``bench_*.py``, and a run of some of them."""

from __future__ import annotations

import ast
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.measure import Comparison

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent

RESULTS = pytest.StashKey[dict[tuple[str, str, str], Comparison]]()
"""Where a pytest session of this folder keeps what it has measured: comparisons by op, label and stage."""


def available() -> dict[str, str]:
    """Each suite with the first line of its docstring."""
    described = {}
    for path in sorted(FOLDER.glob("bench_*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        described[path.stem.removeprefix("bench_")] = text.split("\n")[0]
    return described


# Compared by identity: pytest keeps its plugins in a set.
@dataclass(eq=False)
class Run:
    """What a run of suites came to, and the pytest plugin that collects it.

    Attributes:
        on_start: called with the number of measurements to come.
        on_measurement: called with the name of each measurement when it begins.
        on_end: called when it is over.
        results: comparisons by op, label and stage.
        errors: by measurement, why it did not come to an end.
    """

    on_start: Callable[[int], None] = lambda count: None
    on_measurement: Callable[[str], None] = lambda name: None
    on_end: Callable[[], None] = lambda: None
    results: dict[tuple[str, str, str], Comparison] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.results = session.config.stash[RESULTS]
        self.on_start(len(session.items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors[report.nodeid] = _last_line(report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.on_measurement(nodeid.split("::")[-1])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.errors[report.nodeid] = _last_line(report)

    def pytest_runtest_logfinish(self) -> None:
        self.on_end()


def measure(names: Sequence[str], quick: bool, run: Run) -> None:
    """Measure some suites in this process.

    Args:
        names: of the suites, as :func:`available` has them.
        quick: whether to take tiny sizes.
        run: takes the results and hears of the progress.

    Raises:
        RuntimeError: when pytest could not run them, with what it printed.
    """
    files = [str(FOLDER / f"bench_{name}.py") for name in names]
    options = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "--capture=no"]
    if quick:
        options.append("--quick")
    # Nobody needs what pytest prints, unless it fails: the caller has the results.
    printed = io.StringIO()
    with redirect_stdout(printed):
        status = pytest.main([*options, *files], plugins=[run])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not run.errors:
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(status).name}:\n{printed.getvalue()}")


def _last_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The exception of a failure."""
    marked = [line.removeprefix("E").strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return marked[0] if marked else (report.longreprtext.splitlines() or ["no reason given"])[-1]

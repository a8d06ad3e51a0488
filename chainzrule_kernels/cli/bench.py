"""Measures every op against eager PyTorch, torch.compile, other libraries and a copy of the bytes that it must move.

The suites are those of ``bench/`` in the repository; docs/performance.md says how they measure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import chainzrule_kernels as ck
from chainzrule_kernels.cli.output import print_table

if TYPE_CHECKING:
    from bench.suites import Run

MEASURED, FAILED, NOT_AVAILABLE = 0, 1, 2

_NEEDED = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}
_REPOSITORY = Path(ck.__file__).resolve().parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``bench``."""
    parser.add_argument("--suite", nargs="+", action="extend", metavar="NAME", help="only these suites")
    parser.add_argument("--list", action="store_true", help="print the names of the suites and do nothing else")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; keeps nothing")
    parser.add_argument(
        "--repeat", type=_positive, default=1, metavar="N", help="the whole N times, each in a process of its own"
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="have freed memory stay with the process, which spares all providers alike the system's filling it anew",
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the results as JSON, or print them without FILE"
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="append a row for each figure to this file, beside those of other runs"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="draw the results: one HTML file in this folder")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="compare two JSON files and measure nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and record.

    Without ``--quick`` and ``--json`` the run goes into the history: rows of ``bench/results/measurements.csv``, and a
    JSON file beside it when every suite was run.

    The exit status is 0 when all was measured, 1 when an answer of this package was wrong, a measurement broke off or,
    with ``--compare``, something became slower beyond the noise, and 2 when it cannot run as asked.
    """
    because = _missing_because()
    if because is not None:
        print(f"bench: {because}", file=sys.stderr)
        return NOT_AVAILABLE
    if arguments.compare is not None:
        return _compare(*arguments.compare)

    from bench import allocator, reading, record, suites

    available = suites.available()
    if arguments.list:
        print_table("Suites", ("name", "what it measures"), list(available.items()))
        return MEASURED
    unknown = [name for name in arguments.suite or () if name not in available]
    if unknown:
        print(f"bench: there is no suite {unknown[0]}; there are {', '.join(available)}", file=sys.stderr)
        return NOT_AVAILABLE
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda: PyTorch sees no GPU", file=sys.stderr)
        return NOT_AVAILABLE
    because = _not_kept_because(arguments)
    if because is not None:
        print(f"bench: {because}", file=sys.stderr)
        return NOT_AVAILABLE
    names = [name for name in available if arguments.suite is None or name in arguments.suite]
    if arguments.device == "cuda" and not any(_is_on_gpu(name) for name in names):
        print(f"bench: --device cuda: nothing is measured there of {', '.join(names)}", file=sys.stderr)
        return NOT_AVAILABLE
    if arguments.keep_memory and arguments.repeat == 1:
        try:
            allocator.keep_freed_memory()
        except RuntimeError as error:
            print(f"bench: --keep-memory: {error}", file=sys.stderr)
            return NOT_AVAILABLE
    start = time.perf_counter()
    content = _measured(arguments, names)
    content["seconds"] = round(time.perf_counter() - start, 1)
    # Kept before anything is printed: whoever reads the output may stop reading.
    messages = _keep(arguments, content)
    if arguments.json != "-":
        record.show(content, whole=arguments.suite is None)
        print(f"{len(reading.read(content).comparisons)} comparisons in {content['seconds']} s")
    for name, broken in content["errors"].items():
        print(f"bench: {name} broke off: {broken}", file=sys.stderr)
    for message in messages:
        print(message, file=sys.stderr if arguments.json == "-" else sys.stdout)
    return FAILED if content["errors"] or _is_wrong(content) else MEASURED


def _missing_because() -> str | None:
    """Why the suites cannot run here, or None; the folder of the suites can be imported from then on."""
    if not (_REPOSITORY / "bench" / "suites.py").exists():
        return (
            "the suites are in the repository of this package, in bench/, and not in an installed package: "
            "run this in a checkout"
        )
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return (
            f"needs {', '.join(missing)}, which the package does not install by itself: "
            "pip install 'chainzrule_kernels[bench]'"
        )
    if str(_REPOSITORY) not in sys.path:
        sys.path.insert(0, str(_REPOSITORY))
    return None


def _not_kept_because(arguments: argparse.Namespace) -> str | None:
    """Why the results could not be kept, or None: asked before the minutes of measuring."""
    from bench import table

    if arguments.report is not None and importlib.util.find_spec("jinja2") is None:
        return "--report needs jinja2, which the package does not install by itself: pip install jinja2"
    files = {"--csv": arguments.csv or _history(arguments)}
    if arguments.json not in (None, "-"):
        files["--json"] = Path(arguments.json)
    if arguments.report is not None:
        files["--report"] = arguments.report / "index.html"
    for option, path in files.items():
        because = None if path is None else _not_writable_because(path)
        if because is not None:
            return f"{option}: {because}"
    if files["--csv"] is not None:
        try:
            table.require_same_columns(files["--csv"])
        except ValueError as error:
            return f"--csv: {error}"
    return None


def _history(arguments: argparse.Namespace) -> Path | None:
    """The table that a run joins unasked, or None."""
    if arguments.quick or arguments.json is not None:
        return None
    return _REPOSITORY / "bench" / "results" / "measurements.csv"


def _not_writable_because(path: Path) -> str | None:
    """Why a file cannot be written, its folders made where there are none; or None."""
    if path.is_dir():
        return f"{path} is a folder, expected a file"
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if nearest != path and not nearest.is_dir():
        return f"{nearest} is a file, expected a folder"
    return None if os.access(nearest, os.W_OK) else f"no permission to write {nearest}"


def _is_on_gpu(suite: str) -> bool:
    from bench import gpu

    return any(name.startswith(f"{suite},") for name in gpu.names())


def _measured(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """What a run came to, as the JSON file has it."""
    from bench import record, suites

    if arguments.device == "cuda":
        from bench import gpu

        repetitions = 1 if arguments.quick else max(2, arguments.repeat)
        return gpu.run(lambda work: work.partition(",")[0] in names, repetitions, arguments.quick).as_json()
    if arguments.repeat == 1:
        with _progress() as one:
            suites.measure(names, arguments.quick, one)
        return record.as_json(one.results, arguments.quick, one.errors)
    return record.merged(_repetitions(arguments, names))


def _repetitions(arguments: argparse.Namespace, names: list[str]) -> Iterator[dict[str, Any]]:
    """The same run several times, each in a new process: what differs from process to process belongs to the noise."""
    command = [sys.executable, "-m", "chainzrule_kernels", "bench"]
    command += ["--suite", *names] + (["--quick"] if arguments.quick else [])
    command += ["--keep-memory"] if arguments.keep_memory else []
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(arguments.repeat):
            path = Path(folder) / f"{repetition}.json"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            finished = subprocess.run(
                [*command, "--json", str(path)], env=environment, stdout=subprocess.DEVNULL, check=False
            )
            if not path.exists():
                raise RuntimeError(
                    f"repetition {repetition + 1} ended with status {finished.returncode} and no results"
                )
            yield json.loads(path.read_text(encoding="utf-8"))


def _keep(arguments: argparse.Namespace, content: dict[str, Any]) -> list[str]:
    """Write what was asked for, and say what was written where."""
    from bench import record, table

    messages = []
    history = _history(arguments)
    if arguments.json not in (None, "-"):
        path = Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        messages.append(f"written to {path}")
    elif history is not None and arguments.suite is None:
        messages.append(f"written to {record.write(content, history.parent)}")
    rows = arguments.csv or history
    if rows is not None:
        table.append(content, rows)
        messages.append(f"rows appended to {rows}")
    if arguments.report is not None:
        from bench import report

        messages.append(f"report: {report.write(content, arguments.report)}")
    if arguments.json == "-":
        print(json.dumps(content, indent=1))
    return messages


def _compare(before: Path, after: Path) -> int:
    """Print what became of each time from one file to the other."""
    from bench import comparison, reading

    contents = []
    for path in (before, after):
        try:
            contents.append(json.loads(path.read_text(encoding="utf-8")))
            reading.read(contents[-1])
        except (OSError, TypeError, ValueError) as error:
            print(f"bench: --compare: {path}: {error}", file=sys.stderr)
            return NOT_AVAILABLE
    for line in comparison.lines(*contents):
        print(line)
    return FAILED if comparison.is_slower(*contents) else MEASURED


def _is_wrong(content: Mapping[str, Any]) -> bool:
    """Whether an answer of this package was wrong."""
    from bench import reading

    return any(set(reading.OURS) & comparison.failures.keys() for comparison in reading.read(content).comparisons)


@contextmanager
def _progress() -> Iterator[Run]:
    """A run that shows on a terminal what it measures and how far it is."""
    from bench.suites import Run

    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        yield Run()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("collecting")
        yield Run(
            on_start=lambda count: progress.update(task, total=count),
            on_measurement=lambda name: progress.update(task, description=name),
            on_end=lambda: progress.advance(task),
        )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)

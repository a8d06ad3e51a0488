"""What a run measured: a table for the terminal and a JSON file with all that it takes to understand the numbers."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import chainzrule_kernels as ck
from bench import measure, reading
from bench.allocator import freed_memory
from bench.bounds import BOUNDS, OVERHEAD_CALLS, OVERHEAD_LABEL, Results, keeps
from bench.measure import Comparison
from bench.providers import COPIES
from bench.reading import Promise
from chainzrule_kernels.cli.output import print_table

SHORT = {"copy into a new buffer": "new copy"}
"""Providers by a name that fits a column."""


def machine() -> dict[str, Any]:
    """The processor and how much of it PyTorch uses."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "cpu_module": _cpu_module(),
        "freed_memory": freed_memory(),
    }


def versions() -> dict[str, str]:
    """The software that was measured."""
    return {
        "chainzrule_kernels": ck.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def as_json(results: Results, quick: bool, errors: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Everything about a run; ``errors`` are the measurements that broke off, and why."""
    return {
        "date": now(),
        "machine": machine(),
        "versions": versions(),
        "quick": quick,
        "bounds": bounds(results),
        "comparisons": [asdict(comparison) for comparison in results.values()],
        "errors": dict(errors or {}),
    }


def now() -> str:
    """The date and time of a run."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def bounds(results: Results) -> list[dict[str, Any]]:
    """Each promise with what a run makes of it."""
    return [
        {
            "what": bound.what,
            "limit": bound.limit,
            "sense": "at least" if bound.at_least else "at most",
            "unit": bound.unit,
            "measured": value,
            "met": None if value is None else keeps(value, bound.limit, bound.at_least),
            "reason": bound.reason,
        }
        for bound, value in ((bound, bound.measured(results)) for bound in BOUNDS)
    ]


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """Write the JSON file of a run into a folder, named after what was measured and the date."""
    machine = content["machine"]
    device = machine.get("gpu") or f"{machine['processor']}-{machine['threads']}-threads"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    date = content["date"].replace(":", "").split("+")[0]
    path = folder / f"{name}-{date}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def merged(contents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON files of the repetitions of a run as one, each comparison with the medians of its repetitions."""
    repetitions: dict[tuple[str, str, str], list[Comparison]] = {}
    errors: dict[str, str] = {}
    quick = False
    machine_of_runs: Mapping[str, Any] = {}
    for content in contents:
        errors.update(content["errors"])
        quick, machine_of_runs = content["quick"], content["machine"]
        for one in reading.read(content).comparisons:
            repetitions.setdefault((one.op, one.label, one.stage), []).append(one)
    together = as_json({key: measure.merged(found) for key, found in repetitions.items()}, quick, errors)
    return {**together, "machine": machine_of_runs}


@dataclass(frozen=True)
class Table:
    """The comparisons of one op: a line for each, a column for each provider, and why cells are empty."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """What was measured of each op, and of calls with next to nothing to compute."""
    groups: dict[str, list[Comparison]] = {}
    for one in comparisons:
        if one.label == OVERHEAD_LABEL:
            calls = replace(one, label=one.op)
            groups.setdefault(f"{OVERHEAD_CALLS} calls at {OVERHEAD_LABEL}", []).append(calls)
        else:
            groups.setdefault(one.op, []).append(one)
    return [_table(title, group) for title, group in groups.items()]


def promises_table(promises: Sequence[Promise], whole: bool) -> Table:
    """The promises with what a run makes of them; of a run of some suites only those that it has measured."""
    rows, notes = [], []
    for promise in promises:
        limit = f"{'>=' if promise.at_least else '<='} {promise.limit:g} {promise.unit}".rstrip()
        if promise.measured is not None:
            measured = f"{promise.measured_in_words} {promise.unit}".rstrip()
            rows.append((promise.what, limit, measured, "met" if promise.met else "MISSED"))
        elif whole:
            rows.append((promise.what, limit, "", "not measured"))
        if promise.met is False and promise.reason:
            notes.append(f"{promise.what}: {promise.reason}")
    return Table("What is promised", ("bound", "limit", "measured", ""), tuple(rows), tuple(notes))


def _table(title: str, comparisons: Sequence[Comparison]) -> Table:
    names = dict.fromkeys(name for one in comparisons for name in (*one.timings, *one.failures, *one.skipped))
    # The copies first, the fused kernels last, as they are measured.
    providers = sorted(names, key=lambda name: (name == "fused", name not in COPIES))
    figures: dict[str, Callable[[Comparison], str]] = {
        "GB/s": _rate,
        "of copy": _of_copy,
        "GFLOP/s": _operation_rate,
        "peak MiB fused / plain": _peak,
    }
    figures = {name: figure for name, figure in figures.items() if any(figure(one) for one in comparisons)}
    rows = [
        (
            one.label,
            one.stage,
            *(_time(one, name) for name in providers),
            *(figure(one) for figure in figures.values()),
        )
        for one in comparisons
    ]
    reasons = {f"{name}: not measured: {why}": None for one in comparisons for name, why in one.skipped.items()}
    for one in comparisons:
        for name, why in one.failures.items():
            reasons[f"{name}: FAILED at {one.label}, {one.stage}, no figure: {why}"] = None
    columns = ("arguments", "stage", *(SHORT.get(name, name) for name in providers), *figures)
    return Table(title, columns, tuple(rows), tuple(reasons))


def show(content: Mapping[str, Any], whole: bool) -> None:
    """Print a run: the table of each op, then the promises; of a run of some suites only those it has measured.

    Tiny sizes keep no promise and break none.
    """
    run = reading.read(content)
    promises = () if run.quick else run.promises
    for table in (*tables(run.comparisons), promises_table(promises, whole)):
        if table.rows:
            print_table(table.title, table.columns, table.rows)
            for note in table.notes:
                print(f"  {note}")
            print()
    if run.quick:
        print("Tiny sizes: these figures say only that everything runs.")


def _time(comparison: Comparison, provider: str) -> str:
    if provider in comparison.failures:
        return "FAILED"
    timing = comparison.timings.get(provider)
    return "-" if timing is None else reading.duration(timing.median)


def _rate(comparison: Comparison) -> str:
    return _billions(reading.rate(comparison, reading.ours(comparison) or ""))


def _operation_rate(comparison: Comparison) -> str:
    return _billions(reading.operations_rate(comparison, reading.ours(comparison) or ""))


def _billions(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:.3g}"


def _of_copy(comparison: Comparison) -> str:
    ratio = comparison.ratio("copy", reading.ours(comparison) or "")
    return "" if ratio is None else f"{100 * ratio:.0f}%"


def _peak(comparison: Comparison) -> str:
    plain = next((name for name in ("eager", "plain") if name in comparison.peak_bytes), None)
    if plain is None or "fused" not in comparison.peak_bytes:
        return ""
    return " / ".join(f"{comparison.peak_bytes[name] / 2**20:.3g}" for name in ("fused", plain))


def _cpu_module() -> dict[str, str]:
    """What the compiled module was built for and runs, or why there is none."""
    module = ck._native.cpu
    if module is None:
        return {"missing because": str(ck._native.missing_because)}
    return {"instruction_set": module.instruction_set(), **module.built_for()}


def _processor() -> str:
    """The processor's name as the system tells it."""
    description = Path("/proc/cpuinfo")
    if description.exists():
        found = re.search(r"model name\s*:\s*(.+)", description.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the working tree, marked when the tree has changes."""
    try:
        finished = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return finished.stdout.strip()

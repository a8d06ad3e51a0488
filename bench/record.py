"""What a run measured: a table for the terminal and a JSON file with all that it takes to understand the numbers."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import chainzrule_kernels as ck
from bench.bounds import BOUNDS, Results
from bench.measure import Comparison


def machine() -> dict[str, Any]:
    """The processor and how much of it PyTorch uses."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "cpu_module": _cpu_module(),
    }


def versions() -> dict[str, str]:
    """The software that was measured."""
    return {
        "chainzrule_kernels": ck.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def as_json(results: Results, quick: bool) -> dict[str, Any]:
    """Everything about a run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "quick": quick,
        "bounds": [
            {
                "what": bound.what,
                "limit": bound.limit,
                "sense": "at least" if bound.at_least else "at most",
                "unit": bound.unit,
                "measured": value,
                "met": None if value is None else bound.met_by(value),
                "reason": bound.reason,
            }
            for bound, value in ((bound, bound.measured(results)) for bound in BOUNDS)
        ],
        "comparisons": [asdict(comparison) for comparison in results.values()],
    }


def write(results: Results, folder: Path, quick: bool) -> Path:
    """Write the JSON file, named after the machine and the date."""
    content = as_json(results, quick)
    name = re.sub(r"[^a-z0-9]+", "-", content["machine"]["processor"].lower()).strip("-")
    date = content["date"].replace(":", "").split("+")[0]
    path = folder / f"{name}-{content['machine']['threads']}-threads-{date}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def lines(results: Results) -> Iterator[str]:
    """The tables for the terminal: every comparison, then the bounds."""
    yield f"{'op, arguments, stage':<82}{'provider':<24}{'median':>10}  {'quartiles':<18}{'over fused':>10}"
    for comparison in results.values():
        yield from _comparison_lines(comparison)
    yield ""
    yield f"{'bound':<96}{'limit':>12}{'measured':>12}"
    for bound in BOUNDS:
        value = bound.measured(results)
        limit = f"{'>=' if bound.at_least else '<='} {bound.limit:g} {bound.unit}"
        if value is None:
            yield f"{bound.what:<96}{limit:>12}{'not measured':>14}"
            continue
        verdict = "met" if bound.met_by(value) else "MISSED"
        yield f"{bound.what:<96}{limit:>12}{f'{value:.3g} {bound.unit}':>12}  {verdict}"
        if not bound.met_by(value) and bound.reason:
            yield f"    {bound.reason}"


def _comparison_lines(comparison: Comparison) -> Iterator[str]:
    heading = f"{comparison.op}, {comparison.label}, {comparison.stage}"
    for name, timing in comparison.timings.items():
        spread = f"{_duration(timing.lower_quartile)}..{_duration(timing.upper_quartile)}"
        over = comparison.ratio(name, "fused")
        yield f"{heading:<82}{name:<24}{_duration(timing.median):>10}  {spread:<18}{over:>9.2f}x"
        heading = ""
    for name, size in comparison.peak_bytes.items():
        yield f"{heading:<82}{name:<24}{size / 2**20:>7.2f} MiB"
        heading = ""
    for name, reason in comparison.failures.items():
        yield f"{heading:<82}{name:<24}FAILED, no figure: {reason}"
        heading = ""


def _duration(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}us" if seconds < 1e-3 else f"{1e3 * seconds:.2f}ms"


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

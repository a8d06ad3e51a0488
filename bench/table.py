"""Results as rows of one CSV file, which grows with every run."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import reading
from bench.measure import Comparison

COLUMNS = (
    "date",
    "commit",
    "device",
    "threads",
    "package_version",
    "torch_version",
    "python_version",
    "op",
    "label",
    "stage",
    "model",
    "sweep",
    "position",
    "provider",
    "status",
    "reason",
    "median_seconds",
    "lower_quartile_seconds",
    "upper_quartile_seconds",
    "rounds",
    "bytes",
    "gigabytes_per_second",
    "part_of_copy",
    "operations",
    "gigaflops_per_second",
    "peak_bytes",
)


def append(results: Mapping[str, Any], path: Path) -> None:
    """Add a row for each op, arguments, stage and provider; the file is made where there is none.

    Args:
        results: the content of a result file.
        path: of the CSV file.

    Raises:
        ValueError: when the file has other columns, before anything is written.
    """
    new = list(rows(results))
    is_there = require_same_columns(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not is_there:
            writer.writeheader()
        writer.writerows(new)


def require_same_columns(path: Path) -> bool:
    """Whether the file is there, with the columns of the rows to append.

    Raises:
        ValueError: when it has others.
    """
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open(newline="", encoding="utf-8") as file:
        found = tuple(next(csv.reader(file)))
    if found != COLUMNS:
        missing = [name for name in COLUMNS if name not in found]
        unknown = [name for name in found if name not in COLUMNS]
        raise ValueError(
            f"path: {path} has other columns than the rows to append (missing {missing}, unknown {unknown}, "
            f"{len(found)} where {len(COLUMNS)} were expected); move it away or name another file"
        )
    return True


def rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a result file; what is not known stays empty."""
    run = reading.read(results)
    of_run = {
        "date": run.date,
        "commit": run.versions.get("commit"),
        "device": run.device,
        "threads": run.threads,
        "package_version": run.versions.get("chainzrule_kernels"),
        "torch_version": run.versions.get("torch"),
        "python_version": run.versions.get("python"),
    }
    for comparison in run.comparisons:
        of_comparison = {
            name: getattr(comparison, name)
            for name in ("op", "label", "stage", "model", "sweep", "position", "bytes", "operations")
        }
        for provider in reading.providers(comparison):
            yield {**of_run, **of_comparison, "provider": provider, **_figures(comparison, provider)}


def _figures(comparison: Comparison, provider: str) -> dict[str, Any]:
    if provider in comparison.failures:
        return {"status": "failed", "reason": comparison.failures[provider]}
    if provider in comparison.skipped:
        return {"status": "skipped", "reason": comparison.skipped[provider]}
    figures: dict[str, Any] = {"status": "measured", "peak_bytes": comparison.peak_bytes.get(provider)}
    timing = comparison.timings.get(provider)
    if timing is None:
        return figures
    moved, computed = reading.rate(comparison, provider), reading.operations_rate(comparison, provider)
    return {
        **figures,
        "median_seconds": timing.median,
        "lower_quartile_seconds": timing.lower_quartile,
        "upper_quartile_seconds": timing.upper_quartile,
        "rounds": timing.rounds,
        "gigabytes_per_second": moved and moved / 1e9,
        "part_of_copy": comparison.ratio("copy", provider),
        "gigaflops_per_second": computed and computed / 1e9,
    }

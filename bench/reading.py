"""Result files as Python objects: those of this version, those of older ones, and those of ``bench.gpu``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from bench.bounds import keeps
from bench.measure import Comparison, Timing
from bench.providers import COPIES

OURS = ("fused", "auto", "one kernel", "two kernels")
"""The providers that this package is: the fused op, and on a GPU what the rule chose of the ways to a linear op."""


@dataclass(frozen=True)
class Promise:
    """A bound, and what it came to.

    Attributes:
        what: which quantity, in words.
        limit: the bound.
        at_least: whether the quantity must be at least the limit, or at most.
        unit: behind the number.
        measured: the quantity; None when the run has not measured it.
        reason: what limits it, where known.
    """

    what: str
    limit: float
    at_least: bool
    unit: str
    measured: float | None
    reason: str

    @property
    def met(self) -> bool | None:
        """Whether the promise was kept; None when nothing was measured."""
        if self.measured is None:
            return None
        return keeps(self.measured, self.limit, self.at_least)

    @property
    def measured_in_words(self) -> str:
        """The quantity in three digits, or as many more as show on which side of the limit it lies."""
        if self.measured is None:
            return "not measured"
        digits = 3
        while float(f"{self.measured:.{digits}g}") == self.limit != self.measured:
            digits += 1
        return f"{self.measured:.{digits}g}"


@dataclass(frozen=True)
class Run:
    """One result file.

    Attributes:
        date: when, in ISO format, or ``"unknown"``; so with all names below.
        device: the processor or the GPU, and that freed memory was kept where it was.
        on_gpu: which of the two.
        threads: how many PyTorch used on the processor.
        machine: all that is known of it.
        versions: of the software, with the commit.
        quick: whether sizes were tiny, so that the figures say only that everything runs.
        promises: the bounds.
        comparisons: what was measured.
    """

    date: str
    device: str
    on_gpu: bool
    threads: int | None
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    quick: bool
    promises: tuple[Promise, ...]
    comparisons: tuple[Comparison, ...]


def read(results: Mapping[str, Any]) -> Run:
    """The content of a result file, with None for what an older one does not say.

    Args:
        results: what ``bench.record.as_json`` or ``bench.gpu.as_json`` made.

    Raises:
        TypeError: when it is not a mapping.
        ValueError: when it holds neither kind of results.
    """
    if not isinstance(results, Mapping):
        raise TypeError(f"results: expected the content of a result file, got {type(results).__name__}")
    on_gpu = "results" in results
    if not on_gpu and "comparisons" not in results:
        raise ValueError(f"results: expected the key 'comparisons' or 'results', got {sorted(results)}")
    machine = results.get("machine", {})
    try:
        comparisons = tuple(_of_gpu(results) if on_gpu else map(_comparison, results["comparisons"]))
        promises = tuple(_promise(entry) for entry in results.get("bounds", ()))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"results: an entry is not what a result file holds ({type(error).__name__}: {error})"
        ) from error
    return Run(
        date=results.get("date", "unknown"),
        device=_device(machine),
        on_gpu=on_gpu,
        threads=machine.get("threads"),
        machine=machine,
        versions=results.get("versions", {}),
        quick=bool(results.get("quick", False)),
        promises=promises,
        comparisons=comparisons,
    )


def _device(machine: Mapping[str, Any]) -> str:
    name = str(machine.get("gpu") or machine.get("processor") or "unknown")
    return f"{name}, freed memory kept" if machine.get("freed_memory") == "kept" else name


def rate(comparison: Comparison, provider: str) -> float | None:
    """Bytes of the floor per second; None where the floor or the time is not known."""
    timing = comparison.timings.get(provider)
    return comparison.bytes / timing.median if timing and timing.median and comparison.bytes else None


def operations_rate(comparison: Comparison, provider: str) -> float | None:
    """Floating-point operations per second; None where they are not what bounds the work, or there is no time.

    Copies compute nothing.
    """
    timing = comparison.timings.get(provider)
    if timing is None or not timing.median or not comparison.operations or provider in COPIES:
        return None
    return comparison.operations / timing.median


def ours(comparison: Comparison) -> str | None:
    """The provider of this package; None where it has no timing."""
    return next((name for name in OURS if name in comparison.timings), None)


def providers(comparison: Comparison) -> list[str]:
    """Everyone that the comparison speaks of, those with figures first."""
    everyone = [*comparison.timings, *comparison.peak_bytes, *comparison.failures, *comparison.skipped]
    return list(dict.fromkeys(everyone))


def _comparison(entry: Mapping[str, Any]) -> Comparison:
    known = {field.name: entry[field.name] for field in fields(Comparison) if field.name in entry}
    known["timings"] = {name: _timing(timing) for name, timing in entry.get("timings", {}).items()}
    return Comparison(**known)


def _timing(entry: Mapping[str, Any]) -> Timing:
    known = {field.name: entry[field.name] for field in fields(Timing) if field.name in entry}
    return Timing(**{**known, "run_medians": tuple(entry.get("run_medians") or ())})


def _promise(entry: Mapping[str, Any]) -> Promise:
    return Promise(
        what=entry["what"],
        limit=entry["limit"],
        at_least=entry["sense"] in ("at least", ">="),
        unit=entry.get("unit", ""),
        measured=entry.get("measured"),
        reason=entry.get("reason") or "",
    )


def _of_gpu(results: Mapping[str, Any]) -> Iterator[Comparison]:
    """The work of ``bench.gpu``, whose times are medians of whole runs."""
    for entry in results["results"]:
        op, _, label = entry["work"].partition(", ")
        yield Comparison(
            op,
            label,
            entry["stage"],
            bytes=entry.get("bytes") or None,
            timings={name: _of_runs(seconds) for name, seconds in entry["seconds"].items() if seconds},
            failures=entry.get("failures", {}),
            skipped=entry.get("skipped", {}),
        )
    if results.get("peak_bytes"):
        yield Comparison("polynomial_dreg", "forward and backward", "memory", peak_bytes=results["peak_bytes"])


def _of_runs(medians: Sequence[float]) -> Timing:
    return Timing(statistics.mean(medians), min(medians), max(medians), len(medians), tuple(medians))


def duration(seconds: float) -> str:
    """Three digits with the unit that fits."""
    factor, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{seconds * factor:.3g} {unit}"

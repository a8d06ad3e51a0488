"""Two result files against each other, so that noise is not read as change.

For each comparison and provider that both files have: the ratio of the medians (after over before), an interval for it,
and a verdict. Two things widen the interval, in quadrature on a logarithmic scale:

* the spread of each figure: from the medians of repeated runs where there are any, else the quartiles of the rounds;
* the drift between the files: how far the providers that cannot have changed (:data:`YARDSTICKS`: copies of memory,
  PyTorch's own functions, eager PyTorch) differ from each other.

What the yardsticks have in common, a machine that is slower today, is divided out: once by their median over the whole
file, once by those of the same comparison, which were measured in the same rounds. The interval covers both. "Slower"
means that the whole interval lies above 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench import reading
from bench.measure import Comparison, Timing

YARDSTICKS = frozenset(
    ("copy", "copy into a new buffer", "eager", "F.linear", "F.conv2d", "F.gelu", "without DREG", "plain")
)
"""Providers in which no line of the kernels runs."""

MEMORY_CHANGE = 0.01
"""Peak memory repeats to the byte, but for small tensors that a version of PyTorch allocates otherwise."""


@dataclass(frozen=True)
class Change:
    """One provider in one comparison, in both files.

    Attributes:
        op: of the comparison; so ``label`` and ``stage``.
        provider: whose figure.
        ratio: after over before, the machine's drift divided out.
        low: the lower end of the interval.
        high: the upper end.
        before: seconds.
        after: seconds.
    """

    op: str
    label: str
    stage: str
    provider: str
    ratio: float
    low: float
    high: float
    before: float
    after: float

    @property
    def verdict(self) -> str:
        """``"faster"``, ``"slower"``, or ``"no change beyond noise"``."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "no change beyond noise"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every figure that both files have, but for the yardsticks."""
    pairs = _pairs(reading.read(before), reading.read(after))
    common, deviation = _drift_of_files(pairs)
    found = []
    for (op, label, stage), older, newer in pairs:
        near = _drifts(older, newer)
        shifts = [common, statistics.median(near)] if near else [common]
        for provider, timing in newer.timings.items():
            if provider in YARDSTICKS or provider not in older.timings:
                continue
            earlier = older.timings[provider]
            change = math.log(timing.median / earlier.median)
            below, above = _spread(earlier, timing)
            found.append(
                Change(
                    op,
                    label,
                    stage,
                    provider,
                    math.exp(change - statistics.mean(shifts)),
                    math.exp(change - max(shifts) - math.hypot(below, deviation)),
                    math.exp(change - min(shifts) + math.hypot(above, deviation)),
                    earlier.median,
                    timing.median,
                )
            )
    return found


def is_slower(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether something of this package got slower beyond noise, or lost its figure because its answer is wrong now.

    The times of quick runs say nothing, so that none of them counts.
    """
    older, newer = reading.read(before), reading.read(after)
    if any(provider in reading.OURS for _, provider, _ in _newly_failed(older, newer)):
        return True
    if older.quick or newer.quick:
        return False
    return any(change.verdict == "slower" and change.provider in reading.OURS for change in changes(before, after))


def lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What to print: warnings first, then the changes beyond noise, then how many figures have none."""
    older, newer = reading.read(before), reading.read(after)
    yield f"before: {_description(older)}"
    yield f"after:  {_description(newer)}"
    for warning in warnings(older, newer):
        yield f"WARNING: {warning}"
    pairs = _pairs(older, newer)
    common, deviation = _drift_of_files(pairs)
    if any(_drifts(one, other) for _, one, other in pairs):
        yield (
            f"Copies, eager PyTorch and its functions, which cannot have changed: {math.exp(common):.3f} of their time "
            f"before in the middle, and within {100 * math.expm1(deviation):.0f} % of that."
        )
    yield ""
    found = changes(before, after)
    heading = f"{'op, arguments, stage':<82}{'provider':<24}{'before':>10}{'after':>10}{'ratio':>8}"
    yield f"{heading}  {'interval':<14}verdict"
    for change in sorted(found, key=lambda change: change.verdict == "no change beyond noise"):
        yield (
            f"{f'{change.op}, {change.label}, {change.stage}':<82}{change.provider:<24}"
            f"{reading.duration(change.before):>10}{reading.duration(change.after):>10}{change.ratio:>8.2f}"
            f"  {f'{change.low:.2f}..{change.high:.2f}':<14}{change.verdict}"
        )
    for (op, label, stage), provider, reason in _newly_failed(older, newer):
        yield f"{f'{op}, {label}, {stage}':<82}{provider:<24}FAILED now, no figure: {reason}"
    yield from _memory_lines(pairs)
    yield ""
    counts = {verdict: sum(change.verdict == verdict for change in found) for verdict in ("faster", "slower")}
    alone = len(older.comparisons) + len(newer.comparisons) - 2 * len(pairs)
    yield (
        f"{len(found)} figures in both files: {counts['faster']} faster, {counts['slower']} slower, "
        f"{len(found) - sum(counts.values())} without a change beyond noise. "
        f"{alone} comparisons are in one file only."
    )


def warnings(before: reading.Run, after: reading.Run) -> Iterator[str]:
    """What makes two files hard to compare."""
    if before.device != after.device:
        yield f"two machines: {before.device} and {after.device}"
    if before.threads != after.threads:
        yield f"the number of threads differs: {before.threads} and {after.threads}"
    for name in sorted(before.versions.keys() | after.versions.keys()):
        if name not in ("commit", "chainzrule_kernels") and before.versions.get(name) != after.versions.get(name):
            yield f"the version of {name} differs: {before.versions.get(name)} and {after.versions.get(name)}"
    if _module(before) != _module(after):
        yield f"the compiled modules differ: {_module(before)} and {_module(after)}"
    for when, run in (("before", before), ("after", after)):
        if run.quick:
            yield f"the file of {when} is from a quick run: tiny sizes, whose figures say only that everything runs"
        if str(run.versions.get("commit", "")).endswith("-dirty"):
            yield f"the file of {when} was measured on a working tree with changes"


Pair = tuple[tuple[str, str, str], Comparison, Comparison]


def _pairs(before: reading.Run, after: reading.Run) -> list[Pair]:
    """The comparisons that both files have."""
    older = {(comparison.op, comparison.label, comparison.stage): comparison for comparison in before.comparisons}
    keys = [(comparison.op, comparison.label, comparison.stage) for comparison in after.comparisons]
    return [(key, older[key], newer) for key, newer in zip(keys, after.comparisons, strict=True) if key in older]


def _drifts(before: Comparison, after: Comparison) -> list[float]:
    """The logarithm of the ratio of each yardstick."""
    names = [name for name in after.timings if name in YARDSTICKS and name in before.timings]
    return [math.log(after.timings[name].median / before.timings[name].median) for name in names]


def _drift_of_files(pairs: list[Pair]) -> tuple[float, float]:
    """The logarithm of what the yardsticks have in common, and how far nine in ten of them stay from it.

    One or two cannot say how far they differ from each other: how far they moved at all stands in for it.
    """
    drifts = [drift for _, before, after in pairs for drift in _drifts(before, after)]
    if not drifts:
        return 0.0, 0.0
    common = statistics.median(drifts)
    if len(drifts) < 3:
        return common, max(abs(drift) for drift in drifts)
    sizes = sorted(abs(drift - common) for drift in drifts)
    return common, sizes[math.ceil(0.9 * len(sizes)) - 1]


def _spread(before: Timing, after: Timing) -> tuple[float, float]:
    """How far the logarithm of the ratio may lie below and above what the medians say."""
    (low_before, high_before), (low_after, high_after) = _range(before), _range(after)
    return (
        math.hypot(math.log(after.median / low_after), math.log(high_before / before.median)),
        math.hypot(math.log(high_after / after.median), math.log(before.median / low_before)),
    )


def _range(timing: Timing) -> tuple[float, float]:
    """Between which values the figure lies: the medians of repeated runs, or else the quartiles."""
    if len(timing.run_medians) > 1:
        return min(*timing.run_medians, timing.median), max(*timing.run_medians, timing.median)
    return min(timing.lower_quartile, timing.median), max(timing.upper_quartile, timing.median)


def _newly_failed(before: reading.Run, after: reading.Run) -> list[tuple[tuple[str, str, str], str, str]]:
    """Comparison, provider and reason where there was a figure before and the answer is wrong now."""
    return [
        (key, provider, reason)
        for key, older, newer in _pairs(before, after)
        for provider, reason in newer.failures.items()
        if provider in older.timings
    ]


def _memory_lines(pairs: list[Pair]) -> Iterator[str]:
    for (op, label, stage), older, newer in pairs:
        for provider, size in newer.peak_bytes.items():
            earlier = older.peak_bytes.get(provider)
            if earlier and abs(size / earlier - 1) > MEMORY_CHANGE:
                verdict = "more memory" if size > earlier else "less memory"
                yield (
                    f"{f'{op}, {label}, {stage}':<82}{provider:<24}{earlier / 2**20:>6.1f} MiB{size / 2**20:>6.1f} MiB"
                    f"{size / earlier:>8.2f}  {'':<14}{verdict}"
                )


def _module(run: reading.Run) -> str:
    module = run.machine.get("cpu_module") or {}
    return ", ".join(str(module[name]) for name in ("instruction_set", "compiler") if name in module) or "none"


def _description(run: reading.Run) -> str:
    threads = f", {run.threads} threads" if run.threads else ""
    return f"{run.date}, {run.device}{threads}, commit {run.versions.get('commit', 'unknown')}"

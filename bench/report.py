"""One HTML page from a result file: where each op stands, how its cost grows, and what was not measured.

The page holds everything that it shows, works without a network and without scripts, follows the reader's light or dark
theme, and can be printed. ``report.html`` is its template; the pictures come from :mod:`bench.report_charts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import growth, instructions, reading, report_charts
from bench.bounds import OVERHEAD_CALLS
from bench.measure import Comparison, Timing

MEANINGS = {
    "fused": "this package",
    "auto": "this package, whichever way its rule chooses",
    "one kernel": "this package, all in one kernel",
    "two kernels": "this package, the library's product and one fused pass",
    "eager": "the definition in plain PyTorch",
    "plain": "the modules of PyTorch as they are",
    "compile": "torch.compile of the definition for these very shapes",
    "compile cooperative": "torch.compile with cooperative reductions",
    "copy": "a copy of the bytes that the work must move: the floor",
    "copy into a new buffer": "the same into memory that is allocated first, as every op must",
    "F.linear": "the matrix product alone",
    "F.conv2d": "the convolution alone",
    "F.gelu": "a call of PyTorch's gelu",
    "unfold": "the published code: unfold, matrix product, power, fold",
    "without DREG": "the training step without a penalty",
    "input gradient": "the step with a penalty on the gradient at the input, by double backward",
    "double backward": "the step with a random-projection Jacobian penalty, by double backward",
}
"""What the names of the providers mean."""

STANDING_COLUMNS = (
    "against eager PyTorch",
    "against torch.compile",
    "against the fastest peer",
    "time over the floor",
    "peak memory",
)
"""What the first table says of each op, beside the time."""

OVERHEAD_LABEL = "1x64"
"""The arguments of ``bench_call_overhead``, which times calls by the thousand."""

STAGES = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward + backward",
    "recording": "forward that records for a backward",
    "memory": "forward + backward",
    "memory, forward": "forward",
    "memory, both": "forward + backward",
}
"""Stages in words; those of old files that measured memory alone among them."""


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write ``index.html`` into a folder, which is made where there is none, and return its path.

    Args:
        results: the content of a result file: of this version, of an older one, or of ``bench.gpu``.
        folder: where the page goes.

    Raises:
        TypeError, ValueError: when ``results`` is no such content; before anything is written.
    """
    page = render(results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    import jinja2
    from markupsafe import Markup

    run = reading.read(results)
    growths = growth.fits(results)
    can_draw = find_spec("matplotlib") is not None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    return environment.get_template("report.html").render(
        run=run,
        facts=list(_facts(run)),
        standing_columns=STANDING_COLUMNS,
        standing=[_standing(comparisons) for comparisons in _by_op(run).values()],
        promises=[_promise(promise, run.quick) for promise in run.promises],
        roofs=_roofs(run) if can_draw else [],
        ops=[_section(op, comparisons, growths, can_draw) for op, comparisons in _by_op(run).items()],
        growths=_growth_rows(growths),
        counts=_instruction_counts(),
        missing=list(_missing(run, results, can_draw)),
        meanings={name: MEANINGS.get(name, "another library's function") for name in _everyone(run)},
        role=report_charts.role,
        stages=STAGES,
    )


def _by_op(run: reading.Run) -> dict[str, list[Comparison]]:
    ops: dict[str, list[Comparison]] = {}
    for comparison in run.comparisons:
        ops.setdefault(comparison.op, []).append(comparison)
    return ops


def _everyone(run: reading.Run) -> list[str]:
    """The providers, those whose names need no explanation of their own first."""
    names = {name for comparison in run.comparisons for name in reading.providers(comparison)}
    known = list(MEANINGS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def _facts(run: reading.Run) -> Iterator[tuple[str, str]]:
    """What was measured on, and what."""
    yield "machine", run.device
    if run.threads:
        yield "threads", str(run.threads)
    module = run.machine.get("cpu_module") or {}
    for key, name in (
        ("instruction_set", "instruction set"),
        ("compiler", "compiler"),
        ("missing because", "no module"),
    ):
        if key in module:
            yield name, str(module[key])
    for key in ("driver", "cuda", "hip"):
        if run.machine.get(key):
            yield key, str(run.machine[key])
    for key, value in run.versions.items():
        yield key, str(value)
    yield "date", run.date.replace("T", " ")


def _promise(promise: reading.Promise, quick: bool) -> dict[str, str]:
    """A row of the table of promises; tiny sizes keep none and break none."""
    verdict = "not measured" if quick or promise.met is None else "met" if promise.met else "missed"
    return {
        "what": promise.what,
        "limit": f"{'at least' if promise.at_least else 'at most'} {promise.limit:g} {_unit(promise.unit)}",
        "measured": "–" if verdict == "not measured" else f"{promise.measured_in_words} {_unit(promise.unit)}",
        "verdict": verdict,
        "mark": {"met": "✓", "missed": "✗", "not measured": "–"}[verdict],
        "reason": promise.reason if verdict == "missed" else "",
    }


def _duration(seconds: float) -> str:
    return reading.duration(seconds).replace(" us", " µs")


def _unit(unit: str) -> str:
    return {"x": "×", "us": "µs"}.get(unit, unit)


# ---- where each op stands --------------------------------------------------------------------------------------------


def representative(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The comparison that stands for an op: forward and backward at the main size, or what comes nearest."""
    timed = [comparison for comparison in comparisons if reading.ours(comparison)]
    return min(
        timed,
        key=lambda comparison: (
            comparison.sweep is not None,
            comparison.stage != "both",
            not comparison.label.startswith("main "),
            len(comparison.label),
        ),
        default=None,
    )


def _standing(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """A row of the table that says where each op stands."""
    chosen = representative(comparisons)
    if chosen is None:
        return {
            "op": comparisons[0].op,
            "label": "no figure of ours",
            "stage": "",
            "ours": "–",
            "cells": ["–"] * len(STANDING_COLUMNS),
        }
    mine = str(reading.ours(chosen))
    return {
        "op": chosen.op,
        "label": chosen.label,
        "stage": STAGES.get(chosen.stage, chosen.stage),
        "ours": _duration(chosen.timings[mine].median),
        "cells": [
            _against(chosen, "eager" if "eager" in chosen.timings else "plain"),
            _against(chosen, "compile"),
            _against_peer(comparisons, chosen),
            _over_floor(chosen, mine),
            _memory_share(comparisons, chosen),
        ],
    }


def _against(comparison: Comparison, other: str) -> str:
    """How much faster ours is than someone else, in words."""
    mine = reading.ours(comparison)
    if mine is None or other not in comparison.timings:
        return "–"
    words = _faster(comparison.timings[mine], comparison.timings[other])
    return words if report_charts.role(other) != "peer" else f"{words} ({other})"


def _against_peer(comparisons: Sequence[Comparison], chosen: Comparison) -> str:
    """The same against the fastest peer: at the chosen arguments, or at those of the op that have one."""
    found = [
        (one, name)
        for one in comparisons
        if one.sweep is None and one.stage == chosen.stage and reading.ours(one)
        for name in one.timings
        if report_charts.role(name) == "peer"
    ]
    if not found:
        return "–"
    one, name = min(found, key=lambda at: (at[0] is not chosen, at[0].ratio(at[1], str(reading.ours(at[0])))))
    words = _against(one, name)
    return words if one is chosen else f"{words} at {one.label}"


def _faster(mine: Timing, other: Timing) -> str:
    ratio = other.median / mine.median
    if mine.lower_quartile <= other.upper_quartile and other.lower_quartile <= mine.upper_quartile:
        return f"level ({ratio:.2f}×)"
    return f"{ratio:.3g}× faster" if ratio > 1 else f"{1 / ratio:.3g}× slower"


def _over_floor(comparison: Comparison, mine: str) -> str:
    """The time over that of the library's product where the op contains one, else over the copy of the same bytes."""
    floor = _floor(comparison)
    if floor is None:
        return "–"
    return f"{comparison.timings[mine].median / comparison.timings[floor].median:.3g}× {floor}"


def _floor(comparison: Comparison) -> str | None:
    """The provider that does what no implementation can leave out; None where it was not measured."""
    library = next((name for name in comparison.timings if report_charts.role(name) == "library"), None)
    return library or ("copy" if "copy" in comparison.timings else None)


def _memory_share(comparisons: Sequence[Comparison], chosen: Comparison) -> str:
    """Peak memory over eager PyTorch's, at the same arguments."""
    for comparison in comparisons:
        peaks = comparison.peak_bytes
        mine = next((name for name in reading.OURS if name in peaks), None)
        other = next((name for name in ("eager", "plain") if peaks.get(name)), None)
        if comparison.label == chosen.label and mine and other and comparison.stage != "memory, forward":
            return f"{peaks[mine] / peaks[other]:.2f}× {other}"
    return "–"


# ---- one op ----------------------------------------------------------------------------------------------------------


def _section(
    op: str, comparisons: Sequence[Comparison], growths: Sequence[growth.Growth], can_draw: bool
) -> dict[str, Any]:
    labels = dict.fromkeys(comparison.label for comparison in comparisons if comparison.sweep is None)
    chosen = representative(comparisons)
    panels = [_panel([one for one in comparisons if one.label == label and one.sweep is None]) for label in labels]
    panels.sort(key=lambda panel: chosen is None or panel["label"] != chosen.label)
    return {
        "name": op,
        "anchor": op.replace(" ", "-"),
        "sentence": _sentence(chosen) if chosen else "This run has no figure of this package here.",
        "panels": panels,
        "rows": [row for comparison in comparisons for row in _rows(comparison)],
        "pictures": [report_charts.scaling(series) for series in _sweeps(op, growths)] if can_draw else [],
    }


def _sentence(chosen: Comparison) -> str:
    mine = str(reading.ours(chosen))
    said = [f"{STAGES.get(chosen.stage, chosen.stage).capitalize()} at {chosen.label} takes "]
    said.append(_duration(chosen.timings[mine].median))
    for name in chosen.timings:
        if report_charts.role(name) in ("eager", "compile", "peer"):
            title = {"compile": "torch.compile", "eager": "eager PyTorch", "plain": "the plain modules"}.get(name, name)
            said.append(f"; against {title}: {_faster(chosen.timings[mine], chosen.timings[name])}")
    floor = _floor(chosen)
    if floor:
        ratio = chosen.timings[mine].median / chosen.timings[floor].median
        alone = {"copy": "a copy of the bytes that must move", "without DREG": "the same step without DREG"}
        said.append(f"; {ratio:.3g} times as long as {alone.get(floor, f'{floor} alone')}")
    return "".join(said) + "."


def _panel(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The bars of one set of arguments: times of every stage on one logarithmic scale, and memory."""
    times = [timing for comparison in comparisons for timing in comparison.timings.values()]
    peaks = [size for comparison in comparisons for size in comparison.peak_bytes.values()]
    scale = _Decades([timing.median for timing in times], max((timing.upper_quartile for timing in times), default=1.0))
    return {
        "label": comparisons[0].label,
        "model": _about(comparisons),
        "stages": [
            {
                "name": STAGES.get(comparison.stage, comparison.stage),
                "bars": [_time_bar(comparison, name, scale) for name in _without_figures_last(comparison)],
            }
            for comparison in comparisons
            if comparison.timings or comparison.failures or comparison.skipped
        ],
        "ticks": scale.ticks(),
        "memory": [
            {
                "name": STAGES.get(comparison.stage, comparison.stage),
                "bars": [_memory_bar(name, size, max(peaks)) for name, size in comparison.peak_bytes.items()],
            }
            for comparison in comparisons
            if comparison.peak_bytes
        ],
    }


def _about(comparisons: Sequence[Comparison]) -> str | None:
    if comparisons[0].label == OVERHEAD_LABEL:
        return f"{OVERHEAD_CALLS} calls at a time, of next to no work: what a call costs"
    return next((comparison.model for comparison in comparisons if comparison.model), None)


class _Decades:
    """A logarithmic scale from a power of ten below the values to the largest one, in per cent of a bar's room."""

    def __init__(self, values: Sequence[float], largest: float) -> None:
        positive = [value for value in values if value > 0] or [1e-3]
        self.start = math.floor(math.log10(min(positive) * 0.8))
        self.width = max(1.0, math.log10(max(largest, *positive)) - self.start)

    def place(self, seconds: float) -> float:
        if seconds <= 0:
            return 0.0
        return round(min(100.0, max(0.0, 100 * (math.log10(seconds) - self.start) / self.width)), 2)

    def ticks(self) -> list[tuple[float, str]]:
        decades = range(self.start, math.floor(self.start + self.width) + 1)
        return [(self.place(10.0**decade), _duration(10.0**decade)) for decade in decades]


def _without_figures_last(comparison: Comparison) -> list[str]:
    return [*comparison.timings, *comparison.failures, *comparison.skipped]


def _time_bar(comparison: Comparison, provider: str, scale: _Decades) -> dict[str, Any]:
    bar: dict[str, Any] = {"provider": provider, "role": report_charts.role(provider), "width": 0.0, "whisker": None}
    timing = comparison.timings.get(provider)
    if timing is None:
        return {**bar, "text": _why_none(comparison, provider)}
    low, high = scale.place(timing.lower_quartile), scale.place(timing.upper_quartile)
    text = _duration(timing.median)
    moved = reading.rate(comparison, provider)
    if moved:
        text += f" · {moved / 1e9:.3g} GB/s"
    return {**bar, "width": scale.place(timing.median), "whisker": (low, round(high - low, 2)), "text": text}


def _memory_bar(provider: str, size: int, largest: int) -> dict[str, Any]:
    width = round(100 * size / largest, 2) if largest else 0.0
    text = f"{size / 2**20:.3g} MiB"
    return {"provider": provider, "role": report_charts.role(provider), "width": width, "whisker": None, "text": text}


def _why_none(comparison: Comparison, provider: str) -> str:
    if provider in comparison.failures:
        return f"failed, no figure: {comparison.failures[provider]}"
    return f"not measured: {comparison.skipped[provider]}"


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The rows of the table with all figures."""
    for provider in reading.providers(comparison):
        row = {"label": comparison.label, "stage": STAGES.get(comparison.stage, comparison.stage), "provider": provider}
        timing = comparison.timings.get(provider)
        if timing is None and provider not in comparison.peak_bytes:
            yield {**row, "why": _why_none(comparison, provider)}
            continue
        moved, computed = reading.rate(comparison, provider), reading.operations_rate(comparison, provider)
        of_copy = comparison.ratio("copy", provider)
        peak = comparison.peak_bytes.get(provider)
        spread = timing and f"{_duration(timing.lower_quartile)} to {_duration(timing.upper_quartile)}"
        yield {
            **row,
            "why": None,
            "figures": [
                _duration(timing.median) if timing else "",
                spread or "",
                str(timing.rounds) if timing else "",
                f"{moved / 1e9:.3g}" if moved else "",
                f"{100 * of_copy:.3g} %" if of_copy else "",
                f"{computed / 1e9:.3g}" if computed else "",
                f"{peak / 2**20:.3g}" if peak is not None else "",
            ],
        }


def _sweeps(op: str, growths: Sequence[growth.Growth]) -> list[list[growth.Growth]]:
    """The growths of an op, those of one sweep together; of several stages the last one, forward and backward.

    One of the two copies is enough.
    """
    sweeps: dict[tuple[str, str], list[growth.Growth]] = {}
    for one in growths:
        if one.op == op and one.provider != "copy into a new buffer":
            sweeps.setdefault((one.sweep, one.stage), []).append(one)
    latest = dict(sweeps.keys())
    return [sweeps[sweep, stage] for sweep, stage in latest.items()]


# ---- the rest --------------------------------------------------------------------------------------------------------


def _roofs(run: reading.Run) -> list[report_charts.Picture]:
    drawn = [report_charts.bandwidth(run.comparisons), report_charts.over_intensity(run.comparisons)]
    return [picture for picture in drawn if picture]


def _growth_rows(growths: Sequence[growth.Growth]) -> list[dict[str, Any]]:
    """A row for each op, stage and sweep."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in growths:
        key = (one.op, one.stage, one.sweep)
        extent = f"{one.sweep}, {one.positions[0]:g} to {one.positions[-1]:g}"
        what = f"{one.op}, {STAGES.get(one.stage, one.stage)}"
        # A dash for each column from the start: a template takes a key that is missing for a method of the dictionary.
        columns = dict.fromkeys(("ours", "eager", "copy"), "–")
        row = rows.setdefault(key, {"what": what, "sweep": extent, **columns})
        kind = report_charts.role(one.provider)
        if row.get(kind) == "–":
            row[kind] = growth.exponent_text(one)
        if kind == "ours":
            row["predicted"] = "–" if one.predicted is None else f"{one.predicted:.2f}"
    return [row for row in rows.values() if row["ours"] != "–"]


def _instruction_counts() -> dict[str, Any] | None:
    """The kept instruction counts, one row for each kernel."""
    if not instructions.KEPT.exists():
        return None
    kept = instructions.kept()
    rows = [
        (kernel, counts.get("forward"), counts.get("backward"))
        for kernel, counts in kept["instructions_per_element"].items()
    ]
    return {**kept, "rows": rows}


def _missing(run: reading.Run, results: Mapping[str, Any], can_draw: bool) -> Iterator[tuple[str, str, list[str]]]:
    """What was not measured: kind, reason, and where."""
    found: dict[tuple[str, str], list[str]] = {}
    for comparison in run.comparisons:
        where = f"{comparison.op}, {comparison.label}, {STAGES.get(comparison.stage, comparison.stage)}"
        for provider, reason in comparison.failures.items():
            found.setdefault((f"{provider}: failed", reason), []).append(where)
        for provider, reason in comparison.skipped.items():
            found.setdefault((f"{provider}: skipped", reason), []).append(where)
    for where, reason in results.get("errors", {}).items():
        found.setdefault(("broken off", str(reason)), []).append(str(where))
    for (kind, reason), places in found.items():
        yield kind, reason, places
    unmeasured = [promise.what for promise in run.promises if run.quick or promise.met is None]
    if unmeasured:
        because = "tiny sizes say nothing of them" if run.quick else "this run did not measure what they speak of"
        yield "promises", because, unmeasured
    without_bytes = sorted({one.op for one in run.comparisons if one.timings and not (one.bytes or one.operations)})
    if without_bytes:
        yield "GB/s and FLOP/s", "the result file does not say what had to be moved or computed", without_bytes
    if not any(comparison.sweep for comparison in run.comparisons):
        yield "growth", "the result file holds no sweeps", []
    if not run.on_gpu:
        yield "GPU", "this is a run on a processor; python -m bench.gpu measures on a GPU, where one is", []
    if not can_draw:
        yield "pictures", "matplotlib is not installed", []

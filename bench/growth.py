"""How cost grows: exponents fitted to the times along a sweep, beside those that are predicted.

A time that follows ``t = a x^e`` is a line of slope ``e`` on logarithmic axes; ``e`` is fitted by least squares over
the points of a sweep, with its standard error. The predicted exponent is the same fit of what must be done at these
points: of the floating-point operations where those bound the work, else of the bytes that must move, which are all
that a copy has. So with 1 to 8 tangents, whose bytes go as ``1 + T``, it is below 1. Where a result file says neither,
the sweep's own exponent stands in for it: time is linear in the batch, the width, the tangents and the depth; the
degree, which adds arithmetic and no bytes, costs nothing as long as memory is the bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import reading
from bench.measure import Comparison
from bench.providers import COPIES

STATED = {"batch": 1.0, "width": 1.0, "channels": 1.0, "tangents": 1.0, "depth": 1.0, "degree": 0.0}
"""Exponents for comparisons that say neither bytes nor operations."""

SQUARE = ("width", "channels")
"""Sweeps in which a matrix product or a convolution grows in two dimensions, so that :data:`STATED` does not hold."""


@dataclass(frozen=True)
class Growth:
    """The times of one provider along a sweep.

    Attributes:
        op: the public function, or what else was measured.
        stage: ``"forward"``, ``"backward"``, ``"both"``.
        sweep: which quantity grows.
        provider: whose times.
        positions: the values of the quantity, ascending.
        seconds: the medians there.
        exponent: the fitted one.
        standard_error: of the exponent; None for two points, which any line goes through.
        predicted: the exponent to expect, or None where nothing is known.
    """

    op: str
    stage: str
    sweep: str
    provider: str
    positions: tuple[float, ...]
    seconds: tuple[float, ...]
    exponent: float
    standard_error: float | None
    predicted: float | None


def fit(positions: Sequence[float], values: Sequence[float]) -> tuple[float, float | None]:
    """The slope of ``log(values)`` over ``log(positions)`` by least squares, and its standard error.

    Raises:
        ValueError: for fewer than two different positions, or numbers that have no logarithm.
    """
    if len(set(positions)) < 2 or len(positions) != len(values):
        raise ValueError(f"positions: expected at least two different ones, each with a value, got {list(positions)}")
    if min(*positions, *values) <= 0:
        raise ValueError(f"positions, values: expected positive numbers, got {list(positions)} and {list(values)}")
    x, y = [math.log(position) for position in positions], [math.log(value) for value in values]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread
    if len(x) == 2:
        return slope, None
    left = sum((b - middle_y - slope * (a - middle_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(left / (len(x) - 2) / spread)


def fits(results: Mapping[str, Any]) -> list[Growth]:
    """Every sweep in a result file, for every provider that has times at two points of it or more."""
    return [growth for series in _series(reading.read(results).comparisons) for growth in _of_series(series)]


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The table for the terminal."""
    found = fits(results)
    if not found:
        yield "No sweeps in these results, so no exponents."
        return
    yield f"{'op, stage':<44}{'grows with':<12}{'from..to':<14}{'provider':<24}{'exponent':>15}{'predicted':>11}"
    for growth in found:
        yield (
            f"{f'{growth.op}, {growth.stage}':<44}{growth.sweep:<12}"
            f"{f'{growth.positions[0]:g}..{growth.positions[-1]:g}':<14}{growth.provider:<24}"
            f"{exponent_text(growth):>15}{'-' if growth.predicted is None else f'{growth.predicted:.2f}':>11}"
        )


def exponent_text(growth: Growth) -> str:
    """The exponent and its standard error."""
    error = "" if growth.standard_error is None else f" ± {growth.standard_error:.2f}"
    return f"{growth.exponent:.2f}{error}"


def _series(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """The comparisons of each sweep, by position."""
    sweeps: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.sweep and comparison.position:
            sweeps.setdefault((comparison.op, comparison.sweep, comparison.stage), []).append(comparison)
    series = []
    for members in sweeps.values():
        if len({comparison.position for comparison in members}) == len(members):
            series.append(members)
            continue
        # Several series of one kind: their labels differ in more than numbers.
        by_words: dict[str, list[Comparison]] = {}
        for comparison in members:
            by_words.setdefault(re.sub(r"\d+", "", comparison.label), []).append(comparison)
        series += by_words.values()
    return [sorted(members, key=lambda comparison: comparison.position or 0) for members in series]


def _of_series(series: Sequence[Comparison]) -> Iterator[Growth]:
    names = dict.fromkeys(name for comparison in series for name in comparison.timings)
    for provider in names:
        points = [comparison for comparison in series if provider in comparison.timings]
        positions = tuple(float(comparison.position or 0) for comparison in points)
        if len(set(positions)) < 2:
            continue
        seconds = tuple(comparison.timings[provider].median for comparison in points)
        first = points[0]
        exponent, standard_error = fit(positions, seconds)
        yield Growth(
            first.op,
            first.stage,
            str(first.sweep),
            provider,
            positions,
            seconds,
            exponent,
            standard_error,
            _predicted(points, positions, provider),
        )


def _predicted(points: Sequence[Comparison], positions: Sequence[float], provider: str) -> float | None:
    for quantity in ("bytes",) if provider in COPIES else ("operations", "bytes"):
        amounts = [getattr(comparison, quantity) for comparison in points]
        if all(amounts):
            return fit(positions, amounts)[0]
    first = points[0]
    if first.sweep in SQUARE and ("linear" in first.op or "conv" in first.op or "training" in first.op):
        return None
    return STATED.get(str(first.sweep))

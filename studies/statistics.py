"""How sure a figure is, and whether two methods differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

TIE = 2.5e-5
"""Values as near as this to one another are the same. The stores keep five digits and sums are rounded: without it,
networks that are right on equally many samples would be ranked by that rounding."""


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its confidence interval."""

    mean: float
    half_width: float
    deviation: float

    def percent(self) -> str:
        """As percentages, such as ``77.1 ± 1.2``."""
        return f"{100 * self.mean:.1f} ± {100 * self.half_width:.1f}"

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


@dataclass(frozen=True)
class Comparison:
    """A method against the one of reference, pair by pair.

    Attributes:
        difference: the mean of the reference's values less the other's.
        p: of the two-sided Wilcoxon signed-rank test.
        corrected: ``p`` after Holm's correction for the comparisons that were made together.
    """

    difference: float
    p: float
    corrected: float


def interval(values: Sequence[float], test_to_train: float = 0.0, confidence: float = 0.95) -> Interval:
    """The mean, with Student's interval.

    Args:
        values: at least one; NaN ones make NaN.
        test_to_train: for values from random splits of one data set, the size of the test part over that of the
            training part. Such values are not independent; their variance of the mean is taken as
            ``(1/n + test_to_train) s²`` (Nadeau and Bengio, Machine Learning 52, 2003). 0 for independent ones.
        confidence: of the interval.
    """
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    deviation = float(np.std(values, ddof=1))
    quantile = float(stats.t.ppf(0.5 + 0.5 * confidence, count - 1))
    return Interval(mean, quantile * deviation * math.sqrt(1 / count + test_to_train), deviation)


def compare(reference: Sequence[float], others: Mapping[str, Sequence[float]]) -> dict[str, Comparison]:
    """The reference against each of the others: Wilcoxon's signed-rank test, corrected by Holm's method.

    Args:
        reference: one value for each split or seed.
        others: the same for other methods, by their names, in the same order of splits.
    """
    ps = {name: signed_rank(reference, values) for name, values in others.items()}
    corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
    return {
        name: Comparison(float(np.mean(np.subtract(reference, values))), ps[name], corrected[name])
        for name, values in others.items()
    }


def signed_rank(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p of Wilcoxon's signed-rank test, with ties by :func:`tied`.

    Equal pairs do not count, and where all are equal it is 1.
    """
    differences = np.subtract(first, second)
    sizes = tied(np.abs(differences))
    sizes[sizes <= TIE] = 0.0
    if not sizes.any():
        return 1.0
    return float(stats.wilcoxon(np.sign(differences) * sizes).pvalue)


def tied(values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The values, ``(N,)``, where each that is within :data:`TIE` of the next smaller one is set to that one's."""
    result = np.array(values, np.float64)
    order = np.argsort(result)
    ordered = result[order]
    begins = np.concatenate([[True], np.diff(ordered) > TIE])[: len(ordered)]
    result[order] = ordered[begins][np.cumsum(begins) - 1]
    return result


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, from -1 to 1; NaN where one of them does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(stats.spearmanr(first, second).statistic)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction, ``p_(k) (m - k + 1)`` made monotonous and at most 1 (Scand. Journal of Statistics 6, 1979)."""
    order = np.argsort(ps)
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, float(ps[position]) * (len(ps) - rank)))
        corrected[position] = largest
    return corrected


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of methods over data sets, 1 the best, with the p of Friedman's test; NaN for less than three."""

    ranks: dict[str, float]
    p: float


def friedman(scores: Mapping[str, Sequence[float]]) -> Ranking:
    """Rank methods by their scores, larger ones better; ties, by :func:`tied`, share a rank.

    Args:
        scores: for each method one score for each block, such as data set and seed, in the same order.
    """
    table = np.apply_along_axis(tied, 0, np.array(list(scores.values())))
    ranks = stats.rankdata(-table, axis=0).mean(axis=1)
    if len(table) < 3:
        p = math.nan
    else:
        p = float(stats.friedmanchisquare(*table).pvalue) if (table != table[0]).any() else 1.0
    return Ranking(dict(zip(scores, ranks.tolist(), strict=True)), p)

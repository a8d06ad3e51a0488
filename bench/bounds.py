"""The ratios that this package promises on a CPU, and what they came to in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.measure import Comparison
from bench.workloads import MAIN

Results = Mapping[tuple[str, str, str], Comparison]
"""Comparisons by op, label and stage."""

OVERHEAD_CALLS = 1000
"""How many calls a timing of the call overhead comprises."""

OVERHEAD_LABEL = "1x64"
"""What they are called with."""


def keeps(value: float, limit: float, at_least: bool) -> bool:
    """Whether a value keeps a promise."""
    return value >= limit if at_least else value <= limit


@dataclass(frozen=True)
class Bound:
    """A promise.

    Attributes:
        what: which quantity, in words.
        limit: the bound.
        at_least: whether the quantity must be at least the limit, or at most.
        measured: the quantity, from the results of a run; None when the run has not measured it.
        unit: behind the number.
        reason: what limits the quantity, known for a bound that is missed.
    """

    what: str
    limit: float
    at_least: bool
    measured: Callable[[Results], float | None]
    unit: str = "x"
    reason: str = ""


def _at_main_size(results: Results, op: str, stage: str, variant: str = "") -> Comparison | None:
    """The comparison at the main size, with the op's usual arguments or those that the label ends with."""
    for an_op, label, a_stage in results:
        size, _, rest = label.partition(", ")
        if (an_op, a_stage, rest) == (op, stage, variant) and size.startswith(f"{MAIN.label} "):
            return results[an_op, label, a_stage]
    return None


def _ratio(
    op: str, stage: str, numerator: str, denominator: str, variant: str = ""
) -> Callable[[Results], float | None]:
    def measured(results: Results) -> float | None:
        comparison = _at_main_size(results, op, stage, variant)
        return None if comparison is None else comparison.ratio(numerator, denominator)

    return measured


def _overhead(op: str, stage: str) -> Callable[[Results], float | None]:
    def microseconds(results: Results) -> float | None:
        comparison = results.get((op, OVERHEAD_LABEL, stage))
        if comparison is None or not {"fused", "F.gelu"} <= comparison.timings.keys():
            return None
        seconds = comparison.timings["fused"].median - comparison.timings["F.gelu"].median
        return 1e6 * seconds / OVERHEAD_CALLS

    return microseconds


def _memory(op: str) -> Callable[[Results], float | None]:
    def measured(results: Results) -> float | None:
        comparison = _at_main_size(results, op, "both")
        if comparison is None or not {"fused", "eager"} <= comparison.peak_bytes.keys():
            return None
        return comparison.peak_bytes["fused"] / comparison.peak_bytes["eager"]

    return measured


def _training_steps(network: str, reason: str = "") -> tuple[Bound, ...]:
    """The promises about a training step of one of ``bench.networks``; the reason is that of the first."""
    return (
        Bound(
            f"training step with DREG, {network}: time over the same step without",
            1.05,
            False,
            _ratio("training step", "both", "fused", "without DREG", network),
            reason=reason,
        ),
        Bound(
            f"training step with DREG, {network}: faster than a double-backward Jacobian penalty",
            2,
            True,
            _ratio("training step", "both", "double backward", "fused", network),
        ),
    )


def _worst_layer(stage: str, numerator: str, denominator: str, largest: bool) -> Callable[[Results], float | None]:
    """A ratio of times of ``polynomial_conv2d`` at the layer where it is worst."""

    def measured(results: Results) -> float | None:
        layers = [
            comparison.ratio(numerator, denominator)
            for (op, _, a_stage), comparison in results.items()
            if (op, a_stage) == ("polynomial_conv2d", stage) and comparison.sweep is None
        ]
        ratios = [ratio for ratio in layers if ratio is not None]
        return (max(ratios) if largest else min(ratios)) if ratios else None

    return measured


BOUNDS: tuple[Bound, ...] = (
    Bound(
        "polynomial_dreg forward: a copy of the same bytes takes this part of its time",
        0.85,
        True,
        _ratio("polynomial_dreg", "forward", "copy", "fused"),
        reason="the copy runs in the third-level cache; the kernel's loop is seven multiply-adds a vector, of which "
        "Zen 4 retires one a cycle at 512 bits, and reads four coefficients and a weight beside z",
    ),
    Bound(
        "polynomial_dreg backward, all gradients: a copy of the same bytes takes this part of its time",
        0.35,
        True,
        _ratio("polynomial_dreg", "backward", "copy", "fused"),
        reason="as for the forward, with more arithmetic and five sums for each channel in the first-level cache",
    ),
    Bound(
        "polynomial_dreg forward + backward: faster than eager PyTorch",
        15,
        True,
        _ratio("polynomial_dreg", "both", "eager", "fused"),
        reason="at this size eager PyTorch works in the third-level cache too; at 8192 x 1024 it does not",
    ),
    Bound(
        "polynomial_dreg forward + backward: faster than torch.compile",
        3,
        True,
        _ratio("polynomial_dreg", "both", "compile", "fused"),
        reason="at this size, with coefficients for each channel; at 8192 x 1024 memory decides",
    ),
    Bound(
        "linear_polynomial_dreg forward: time over F.linear alone",
        1.10,
        False,
        _ratio("linear_polynomial_dreg", "forward", "fused", "F.linear"),
    ),
    Bound(
        "linear_polynomial_dreg forward + backward: time over F.linear alone",
        1.10,
        False,
        _ratio("linear_polynomial_dreg", "both", "fused", "F.linear"),
    ),
    Bound(
        "training step with DREG: time over the same step without",
        1.05,
        False,
        _ratio("training step", "both", "fused", "without DREG"),
    ),
    Bound(
        "training step with DREG: faster than a double-backward Jacobian penalty, one projection",
        2,
        True,
        _ratio("training step", "both", "double backward", "fused"),
    ),
    *_training_steps("GELU perceptron", "runs differ by as much"),
    *_training_steps("transformer block", "runs differ by as much"),
    *_training_steps(
        "convolutional",
        "two calls from Python for each layer, on caches that the convolutions have emptied",
    ),
    Bound(
        "polynomial_conv2d forward: time over F.conv2d alone, the worst layer",
        1.05,
        False,
        _worst_layer("forward", "fused", "F.conv2d", largest=True),
        reason="the sums have left the second-level caches before the pass; building the coefficients and the call",
    ),
    Bound(
        "polynomial_conv2d forward + backward: faster than the unfolded, the worst layer",
        7,
        True,
        _worst_layer("both", "unfold", "fused", largest=False),
        reason="F.conv2d alone, without a polynomial, is 1.6 to 5.5 times faster than the unfolded at the 3x3 layers",
    ),
    Bound("polynomial call at 1x64: time over F.gelu", 10, False, _overhead("polynomial", "forward"), "us"),
    Bound("polynomial_dreg call at 1x64: time over F.gelu", 10, False, _overhead("polynomial_dreg", "forward"), "us"),
    Bound(
        "polynomial_dreg call at 1x64 that records gradients: time over F.gelu",
        10,
        False,
        _overhead("polynomial_dreg", "recording"),
        "us",
    ),
    Bound(
        "polynomial_dreg forward + backward: peak memory over eager PyTorch",
        0.35,
        False,
        _memory("polynomial_dreg"),
    ),
    Bound(
        "training step with DREG: peak memory over eager PyTorch",
        0.35,
        False,
        _memory("training step"),
    ),
)

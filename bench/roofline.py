"""How much arithmetic the polynomial ops do for each byte: where their points stand in a roofline plot.

The counts are nominal: Horner's scheme for value, slope and curvature, a multiply-add as two operations, and each
product and sum of the formulas in docs/mathematics.md once. Activations have none, because no count of an exponential
is agreed on; ops that contain a matrix product or a convolution carry theirs in the results (``operations``).
"""

from __future__ import annotations

import re

from bench.measure import Comparison

STREAMS = {"forward": 2, "backward": 3, "both": 5}
"""Tensors as large as ``z`` that a stage reads or writes."""

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def intensity(comparison: Comparison) -> float | None:
    """Floating-point operations for each byte of the floor; None where there is no count."""
    if comparison.operations and comparison.bytes:
        return comparison.operations / comparison.bytes
    dtype = re.search(r"\b(float64|float32|bfloat16|float16)\b", comparison.label)
    each = operations_per_element(comparison.op, _degree(comparison), comparison.stage)
    if dtype is None or each is None:
        return None
    return each / (STREAMS[comparison.stage] * ITEM_BYTES[dtype[1]])


def operations_per_element(op: str, degree: int, stage: str) -> int | None:
    """Operations for each element of ``z``, with gradients of everything in a backward; None for other ops or stages.

    With ``D`` the degree: value ``2 D``, slope ``2 (D - 1)``, curvature ``2 (D - 2)``, the term of the norm 3. A
    backward of ``polynomial`` adds 1 for ``dz`` and ``2 D + 1`` for the sums of the coefficients; one of
    ``polynomial_dreg`` 2 for ``h``, 3 for ``dz``, 3 for the gradient of ``row_sq``, ``6 D + 1`` for the coefficients.
    """
    slope, curvature = 2 * (degree - 1), 2 * max(0, degree - 2)
    counts = {
        "polynomial": (2 * degree, slope + 1 + 2 * degree + 1),
        "polynomial_dreg": (2 * degree + slope + 3, slope + curvature + 2 + 3 + 3 + 6 * degree + 1),
    }
    if op not in counts or stage not in STREAMS:
        return None
    forward, backward = counts[op]
    return {"forward": forward, "backward": backward, "both": forward + backward}[stage]


def _degree(comparison: Comparison) -> int:
    """Of a sweep over degrees; everything else in the suites is cubic."""
    return comparison.position if comparison.sweep == "degree" and comparison.position else 3

"""Finds the coefficients of ``normal_distribution`` in ``csrc/cpu/vector.h`` and prints them with their errors.

With ``e = exp(-a²/2)`` the probability of the normal distribution's tail beyond ``a >= 0`` is ``e g(a)``, where
``g(a) = erfcx(a / √2) / 2`` falls from 1/2 at 0 like ``1 / a`` and is approximated by ``P(a) / Q(a)``, ``P`` of degree 4 and
``Q`` of degree 5, on [0, 16] (beyond, ``e`` is 0 in float32). ``e`` itself is a power of two: ``2^r`` is approximated by
a polynomial of degree 6 on [-1/2, 1/2]. Both are exact at 0, and both fits minimise the largest relative error by least squares
whose weights grow where the error is large (Lawson). A coefficient is rounded to float32 as soon as it is found, the first
power first, and the fit of the others makes up for it.

Run: ``python csrc/math/fit_normal.py`` (needs NumPy and SciPy).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx

Array = NDArray[np.float64]
ROUNDS = 60


def fitted(columns: Array, target: Array, weight_of: Array, denominator: int) -> Array:
    """``x`` with ``columns @ x`` close to ``target``, each ``x`` rounded to float32.

    Args:
        columns: one for each coefficient.
        target: what their sum should be.
        weight_of: the reciprocal of what an error is relative to.
        denominator: how many of the last columns belong to a denominator, whose values divide the error.
    """
    found = np.zeros(columns.shape[1])
    for known in range(len(found) + 1):
        free = columns[:, known:]
        rest = target - columns[:, :known] @ found[:known]
        lawson, divisor = np.ones(len(target)), np.ones(len(target))
        for _ in range(ROUNDS if free.shape[1] else 0):
            weights = lawson * weight_of / divisor
            size = np.linalg.norm(free * weights[:, None], axis=0)
            solution = np.linalg.lstsq(free * weights[:, None] / size, rest * weights, rcond=None)[0] / size
            found[known:] = solution
            if denominator:
                divisor = 1 - (columns[:, -denominator:] @ found[-denominator:]) * weight_of
            errors = np.abs((free @ solution - rest) * weight_of / divisor)
            lawson *= np.sqrt(errors / errors.max() + 1e-3)
            lawson /= lawson.max()
        if known < len(found):
            found[known] = np.float32(found[known])
    return found


def chebyshev(low: float, high: float, count: int = 2000) -> Array:
    """Points that crowd towards the ends."""
    angles = (np.arange(count) + 0.5) / count * np.pi
    return low + (high - low) * (1 - np.cos(angles)) / 2


def powers(x: Array, degree: int) -> Array:
    """``x, x², …`` as columns."""
    return np.stack([x**k for k in range(1, degree + 1)], axis=1)


def show(name: str, coefficients: Array, error: Array) -> None:
    """One line for the constants, one for the largest relative error."""
    print(f"{name}: " + ", ".join(f"{value:.9g}f" for value in coefficients))
    if error.size:
        print(f"  largest relative error {np.abs(error).max():.2e}")


def main() -> None:
    """Print the coefficients of ``2^r``, ``P`` and ``Q``, from the first power on."""
    r = chebyshev(-0.5, 0.5)
    power = fitted(powers(r, 6), 2**r - 1, 2**-r, 0)
    show("2^r", power, (1 + powers(r, 6) @ power) / 2**r - 1)

    a = chebyshev(0.0, 1.0) ** 1.5 * 16.0
    g = erfcx(a / np.sqrt(2)) / 2
    # P - g Q = 0, linear in the coefficients; the constant ones are 1/2 and 1.
    ratio = fitted(np.concatenate([powers(a, 4), -g[:, None] * powers(a, 5)], axis=1), g - 0.5, 1 / g, 5)
    show("P", ratio[:4], np.array([]))
    show("Q", ratio[4:], (0.5 + powers(a, 4) @ ratio[:4]) / (1 + powers(a, 5) @ ratio[4:]) / g - 1)


if __name__ == "__main__":
    main()

"""The scalar functions in Triton: value, slope and curvature of the polynomial and of each fixed activation.

The twin of ``csrc/math``, with the same formulas: they avoid the differences of nearly equal numbers (``1 - tanh²`` and
``s (1 - s)`` far out) of the textbook ones. Everything here computes in the dtype of its argument, float32 or float64;
callers convert half precision before (the interpreter would otherwise compute with the bits of bfloat16). What a caller
does not use of a result, the compiler removes.
"""

# Triton reads the source of these functions and evaluates their annotations: no `from __future__ import annotations`
# here.

import triton
import triton.language as tl


@triton.jit
def exponential(x):
    """``exp(x)`` for ``x <= 80``.

    In float32 the hardware has ``2^t``. The rounding error of ``t = x log2(e)`` grows with ``x``; what it lost comes
    back in the last factor. Below -110 the result is zero, and the infinity that would make that factor NaN is kept
    out.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        in_range = tl.where(x < -110.0, -110.0, x)
        t = in_range * 1.4426950408889634
        lost = tl.fma(in_range, 1.4426950216293335 + tl.zeros_like(x), -t) + in_range * 1.92596298909109e-08
        return tl.exp2(t) * (1.0 + 0.6931471805599453 * lost)


@triton.jit
def hyperbolic_tangent(x, decay):
    """``tanh(x)``; ``decay`` is ``exp(-2 |x|)``, which the callers have at hand."""
    if x.dtype == tl.float64:
        # tanh(x) = m / (m + 2) with m = exp(2x) - 1, which is computed to full precision from exp and log (Kahan).
        doubled = 2.0 * tl.where(tl.abs(x) < 0.625, x, 0.5 + tl.zeros_like(x))
        e = tl.exp(doubled)
        m = tl.where(e == 1.0, doubled, (e - 1.0) * doubled / tl.log(tl.where(e == 1.0, 2.0 + tl.zeros_like(x), e)))
        near = m / (m + 2.0)
    else:
        s = x * x
        near = -5.70498872745e-3 * s + 2.06390887954e-2
        near = near * s - 5.37397155531e-2
        near = near * s + 1.33314422036e-1
        near = near * s - 3.33332819422e-1
        near = near * (s * x) + x
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def logarithm_of_one_plus(x):
    """``log(1 + x)`` for ``0 <= x <= 1``, which is all that softplus asks of it."""
    sum = 1.0 + x
    lost = x - (sum - 1.0)
    if x.dtype == tl.float64:
        return tl.log(sum) + lost / sum
    else:
        large = sum > 1.41421356
        m = tl.where(large, 0.5 * sum, sum) - 1.0
        m_sq = m * m
        p = 7.0376836292e-2 * m - 1.1514610310e-1
        p = p * m + 1.1676998740e-1
        p = p * m - 1.2420140846e-1
        p = p * m + 1.4249322787e-1
        p = p * m - 1.6668057665e-1
        p = p * m + 2.0000714765e-1
        p = p * m - 2.4999993993e-1
        p = p * m + 3.3333331174e-1
        p = p * m * m_sq - 0.5 * m_sq
        # log(2) in two parts, the first of them exact.
        high = tl.where(large, 0.693359375, 0.0)
        low = tl.where(large, -2.12194440e-4, 0.0)
        return high + (m + (p + (low + lost / sum)))


@triton.jit
def logistic(z):
    """``1 / (1 + exp(-z))`` with its first two derivatives, from ``t = exp(-|z|)``, which never overflows."""
    t = exponential(-tl.abs(z))
    r = 1.0 / (1.0 + t)
    smaller = t * r  # of s and 1 - s, so that the difference below loses nothing
    slope = smaller - smaller * smaller
    twist = 2.0 * smaller - 1.0  # 1 - 2 s for z >= 0
    negative = z < 0.0
    return tl.where(negative, smaller, r), slope, slope * tl.where(negative, -twist, twist)


@triton.jit
def tangent_hyperbolic(z, decay):
    """``tanh(z)`` with its first two derivatives; ``decay`` is ``exp(-2 |z|)``."""
    r = 1.0 / (1.0 + decay)
    value = hyperbolic_tangent(z, decay)
    # Near 0 the difference loses nothing, and far out the product does not.
    slope = tl.where(tl.abs(z) < 0.6, 1.0 - value * value, 4.0 * decay * r * r)
    return value, slope, -2.0 * value * slope


@triton.jit
def bounded(z):
    """``z`` where a derivative still moves. Farther out it has reached its limit, and ``0 · inf`` would make it NaN."""
    return tl.where(z > 1e3, 1e3, tl.where(z < -1e3, -1e3, z))


@triton.jit
def activation(z, KIND: tl.constexpr):
    """Value, slope and curvature of a fixed activation at ``z``."""
    if KIND == "relu":
        # As in PyTorch: slope 0 at 0, and NaN passes through.
        zero = tl.zeros_like(z)
        return tl.where(z < 0.0, zero, z), tl.where(z <= 0.0, zero, zero + 1.0), zero
    elif KIND == "gelu":
        x = bounded(z)
        x_sq = x * x
        density = 0.39894228040143267794 * exponential(-0.5 * x_sq)
        probability = 0.5 + 0.5 * tl.erf(0.70710678118654752440 * x)
        return z * probability, probability + x * density, density * (2.0 - x_sq)
    elif KIND == "gelu_tanh":
        scale: tl.constexpr = 0.79788456080286535588  # sqrt(2 / pi)
        cubic: tl.constexpr = 0.044715
        x = bounded(z)
        x_sq = x * x
        u = scale * (x + cubic * x_sq * x)
        decay = exponential(-2.0 * tl.abs(u))
        _, slope, curvature = tangent_hyperbolic(u, decay)
        inner_1 = scale * (1.0 + 3.0 * cubic * x_sq)
        inner_2 = 6.0 * scale * cubic * x
        t_1 = slope * inner_1
        t_2 = slope * inner_2 + curvature * inner_1 * inner_1
        half_x = 0.5 * x
        # (1 + tanh(u)) / 2, which is the logistic function of 2 u.
        gate = tl.where(u < 0.0, decay, 1.0) / (1.0 + decay)
        return z * gate, gate + half_x * t_1, t_1 + half_x * t_2
    elif KIND == "silu":
        x = bounded(z)
        s, s_1, s_2 = logistic(x)
        return z * s, s + x * s_1, 2.0 * s_1 + x * s_2
    elif KIND == "tanh":
        return tangent_hyperbolic(z, exponential(-2.0 * tl.abs(z)))
    elif KIND == "sigmoid":
        return logistic(z)
    elif KIND == "softplus":
        s, s_1, s_2 = logistic(z)
        positive_part = tl.where(z < 0.0, tl.zeros_like(z), z)
        return positive_part + logarithm_of_one_plus(exponential(-tl.abs(z))), s, s_1
    else:
        tl.static_assert(KIND == "mish", "there is no activation of this name")
        # z w with w = tanh(softplus(z)) = n / (n + 2), n = e (e + 2), e = exp(z), and with r = 1 / (n + 2)
        # w' = 4 e r (1 + e) r and w'' = 4 e r (1 - 2 e w) r. Beyond 29 w is 1 to the last bit, and its derivatives are
        # taken for 0; up to it no product overflows.
        saturated = z > 29.0
        capped = tl.where(saturated, 29.0 + tl.zeros_like(z), z)
        x = tl.where(capped < -1e3, -1e3, capped)
        e = exponential(capped)
        n = e * (e + 2.0)
        r = 1.0 / (n + 2.0)
        w = tl.where(z < 0.0, n * r, 1.0 - 2.0 * r)
        factor = tl.where(saturated, tl.zeros_like(z), 4.0 * (e * r))
        one_plus_e = 1.0 + e
        w_1 = factor * (one_plus_e * r)
        return z * w, w + x * w_1, factor * (r * (2.0 * one_plus_e + x * (1.0 - 2.0 * e * w)))


@triton.jit
def polynomial(z, coeffs, DEGREE: tl.constexpr):
    """Value, slope and curvature of a polynomial at ``z``; ``coeffs`` is a tuple of ``DEGREE + 1`` that broadcast to
    ``z``.

    Horner's rule for ``p``, and the same recurrence differentiated: ``p'`` and ``p''/2`` ride along. Their first
    steps are written as assignments, because ``0 · inf`` is not 0.
    """
    value = coeffs[DEGREE] * z + coeffs[DEGREE - 1]
    slope = coeffs[DEGREE] + tl.zeros_like(z)
    half_curvature = tl.zeros_like(z)
    for step in tl.static_range(DEGREE - 1):
        if step == 0:
            half_curvature = slope
        else:
            half_curvature = half_curvature * z + slope
        slope = slope * z + value
        value = value * z + coeffs[DEGREE - 2 - step]
    return value, slope, half_curvature + half_curvature


@triton.jit
def rectified(z):
    """``relu(z)``; NaN passes through."""
    return tl.where(z < 0.0, tl.zeros_like(z), z)


@triton.jit
def where_rising(z, values):
    """Zero where relu is flat: for ``z <= 0``, which NaN is not."""
    return tl.where(z <= 0.0, tl.zeros_like(z), values)


@triton.jit
def function(z, coeffs, KIND: tl.constexpr, DEGREE: tl.constexpr):
    """Value, slope and curvature at ``z`` of the function ``KIND``.

    That is ``"polynomial"``, ``"rectified_polynomial"``, which is the polynomial of ``relu(z)``, or an activation.
    """
    if KIND == "polynomial":
        return polynomial(z, coeffs, DEGREE)
    elif KIND == "rectified_polynomial":
        # From here on by relu(z) alone, which is positive where z is: z itself would stay in registers beside it.
        z = rectified(z)
        value, slope, curvature = polynomial(z, coeffs, DEGREE)
        return value, where_rising(z, slope), where_rising(z, curvature)
    else:
        return activation(z, KIND)


@triton.jit
def times_slope(z, values, slope, KIND: tl.constexpr):
    """``values f'(z)``. Where relu is flat nothing passes, as in PyTorch, what is infinite or NaN neither."""
    # By relu(z), as in `function`, and by a comparison of its own: masks would stay in registers, too.
    if KIND == "relu":
        return where_rising(rectified(z), values)
    elif KIND == "rectified_polynomial":
        return where_rising(rectified(z), values * slope)
    else:
        return values * slope


@triton.jit
def times_curvature(z, values, curvature, KIND: tl.constexpr):
    """``values f''(z)``, likewise. Relu has no curvature, and lets nothing pass at all."""
    if KIND == "relu":
        return tl.zeros_like(z)
    elif KIND == "rectified_polynomial":
        return where_rising(rectified(z), values * curvature)
    else:
        return values * curvature

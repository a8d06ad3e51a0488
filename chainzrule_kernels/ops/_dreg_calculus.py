r"""Derivatives of ``y = f(z)``, ``jac_sq = Σ_j f'(z_j)² r_j`` for any scalar function ``f`` (SPEC 2.2).

Plain PyTorch, shared by ``polynomial`` and all ``*_dreg`` ops. Notation: ``f_1, f_2, f_3`` are
``f', f'', f'''`` at ``z``; ``r`` is ``row_sq``; ``g_y, g_s, g_d`` are the gradients that arrive for ``y``, ``jac_sq``
and ``derivative``; ``h = 2 g_s r f' + g_d`` is what arrives at ``f'`` in all. For polynomials a direction ``c_dot`` in
coefficient space is itself a polynomial, and its value and derivatives enter as ``C_0, C_1, C_2``.

Everything that double backward needs follows from one scalar. With cotangents ``a, e, b`` for the three results of the
backward ``(dz, drow_sq, dcoeffs)`` and ``B`` the polynomial with coefficients ``b``::

    S = Σ  g_y (a f' + B) + h (a f'' + B') + e g_s f'²
"""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import Polynomial, ScalarFunction
from chainzrule_kernels.ops._terms import column, over_batch, over_channels, plus, times

Optional3 = tuple[Tensor | None, Tensor | None, Tensor | None]


def backward(function: ScalarFunction, z: Tensor, row_sq: Tensor | None, grads: Optional3) -> Optional3:
    """``(dz, drow_sq, dcoeffs)`` in the compute dtype; ``dcoeffs`` is None for a function without coefficients."""
    g_y, g_s, g_d = _gradients(grads)
    f_1, f_2 = slopes(function, z, 2)
    h = plus(times(2.0, g_s, _or_one(row_sq), f_1), g_d)
    dz = let_through(function, z, plus(times(g_y, f_1), times(h, f_2)))
    drow_sq = over_batch(times(g_s, f_1, f_1), row_sq)
    dcoeffs = function.coefficient_gradient(z, (g_y, h)) if isinstance(function, Polynomial) else None
    return dz, drow_sq, dcoeffs


def jvp(function: ScalarFunction, z: Tensor, row_sq: Tensor | None, changes: Optional3) -> Optional3:
    """The tangents of ``(y, jac_sq, derivative)`` along a change of ``(z, row_sq, coeffs)``."""
    z_dot, row_sq_dot, coeffs_dot = changes
    f_1, f_2 = slopes(function, z, 2)
    C_0, C_1, _ = direction(function, coeffs_dot, z, 1)
    y_dot = plus(let_through(function, z, times(f_1, z_dot)), C_0)
    f_1_dot = plus(let_through(function, z, times(f_2, z_dot)), C_1)
    jac_sq_dot = over_channels(plus(times(2.0, _or_one(row_sq), f_1, f_1_dot), times(row_sq_dot, f_1, f_1)))
    return y_dot, jac_sq_dot, f_1_dot


def backward_vjp(
    function: ScalarFunction, z: Tensor, row_sq: Tensor | None, grads: Optional3, cotangents: Optional3
) -> tuple[Tensor | None, ...]:
    """The gradients of ``S`` with respect to ``(z, row_sq, coeffs, grad_y, grad_jac_sq, grad_derivative)``."""
    g_y, g_s, g_d = _gradients(grads)
    a, e, b = cotangents
    r = _or_one(row_sq)
    f_1, f_2, f_3 = slopes(function, z, 3)
    B_0, B_1, B_2 = direction(function, b, z, 2)
    h = plus(times(2.0, g_s, r, f_1), g_d)
    at_value = plus(let_through(function, z, times(a, f_1)), B_0)
    at_slope = plus(let_through(function, z, times(a, f_2)), B_1)
    dz = plus(
        times(g_y, at_slope),
        times(2.0, g_s, r, f_2, at_slope),
        times(h, plus(times(a, f_3), B_2)),
        times(2.0, g_s, e, f_1, f_2),
    )
    dz = let_through(function, z, dz)
    drow_sq = over_batch(times(2.0, g_s, f_1, at_slope), row_sq)
    dcoeffs = None
    if isinstance(function, Polynomial):
        slope_weight = plus(times(g_y, a), times(2.0, g_s, r, at_slope), times(2.0, g_s, e, f_1))
        dcoeffs = function.coefficient_gradient(z, (None, slope_weight, times(h, a)))
    dgrad_jac_sq = over_channels(plus(times(2.0, r, f_1, at_slope), times(e, f_1, f_1)))
    return dz, drow_sq, dcoeffs, at_value, dgrad_jac_sq, at_slope


def backward_jvp(
    function: ScalarFunction,
    z: Tensor,
    row_sq: Tensor | None,
    grads: Optional3,
    changes: Optional3,
    grads_changes: Optional3,
) -> Optional3:
    """The tangents of ``(dz, drow_sq, dcoeffs)`` along changes of the inputs and of the gradients that arrive."""
    g_y, g_s, g_d = _gradients(grads)
    g_y_dot, g_s_dot, g_d_dot = _gradients(grads_changes)
    z_dot, row_sq_dot, coeffs_dot = changes
    r = _or_one(row_sq)
    f_1, f_2, f_3 = slopes(function, z, 3)
    _, C_1, C_2 = direction(function, coeffs_dot, z, 2)
    f_1_dot = plus(let_through(function, z, times(f_2, z_dot)), C_1)
    f_2_dot = plus(times(f_3, z_dot), C_2)
    h = plus(times(2.0, g_s, r, f_1), g_d)
    h_dot = plus(times(2.0, g_s_dot, r, f_1), times(2.0, g_s, row_sq_dot, f_1), times(2.0, g_s, r, f_1_dot), g_d_dot)
    dz_dot = plus(times(g_y_dot, f_1), times(g_y, f_1_dot), times(h_dot, f_2), times(h, f_2_dot))
    dz_dot = let_through(function, z, dz_dot)
    drow_sq_dot = over_batch(plus(times(g_s_dot, f_1, f_1), times(2.0, g_s, f_1, f_1_dot)), row_sq)
    dcoeffs_dot = None
    if isinstance(function, Polynomial):
        weights = (g_y_dot, plus(times(g_y, z_dot), h_dot), times(h, z_dot))
        dcoeffs_dot = function.coefficient_gradient(z, weights)
    return dz_dot, drow_sq_dot, dcoeffs_dot


def slopes(function: ScalarFunction, z: Tensor, order: int) -> tuple[Tensor | None, ...]:
    """``(f', …, f^(order))`` at ``z``; those of a function without curvature are absent from ``f''`` on, not zero."""
    _, slope, *others = function.derivatives(z, order)
    return slope, *(others if function.curved else [None] * len(others))


def let_through(function: ScalarFunction, z: Tensor, term: Tensor | None) -> Tensor | None:
    """The term, in which every product has a derivative at ``z``: zero where the function lets nothing through."""
    return None if term is None else function.let_through(z, term)


def direction(function: ScalarFunction, coeffs: Tensor | None, z: Tensor, order: int) -> Optional3:
    """Value, slope and (from ``order`` 2 on) curvature at ``z`` of ``function`` with these coefficients, if any."""
    if coeffs is None or not isinstance(function, Polynomial):
        return None, None, None
    values = type(function)(coeffs).derivatives(z, order)
    return values[0], values[1], values[2] if order > 1 else None


def _gradients(grads: Optional3) -> Optional3:
    """``g_y``, ``g_s`` as a column, ``g_d``."""
    return grads[0], column(grads[1]), grads[2]


def _or_one(row_sq: Tensor | None) -> Tensor | float:
    return 1.0 if row_sq is None else row_sq

r"""Derivatives of ``y = f(z)``, ``ẏ_t = f'(z) ż_t``, ``q_t = Σ_j ẏ_tj²`` for any scalar function ``f`` (SPEC 2.3).

Plain PyTorch, shared by ``polynomial_tangent`` and ``activation_tangent``. Notation as in ``_dreg_calculus``;
``g_y, g_t, g_q`` are the gradients that arrive for ``y``, ``y_dot`` and ``tangent_sq``; ``u_t = g_t + 2 g_q f' ż_t`` is
what arrives at ``ẏ_t`` in all, and ``v = Σ_t u_t ż_t`` is what arrives at ``f'``. The scalar behind double backward,
with cotangents ``a, b_t, c`` for ``(dz, dz_dot, dcoeffs)`` and ``B`` the polynomial with coefficients ``c``::

    S = Σ  g_y (a f' + B) + v (a f'' + B') + Σ_t b_t u_t f'
"""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import Polynomial, ScalarFunction
from chainzrule_kernels.ops._dreg_calculus import Optional3, direction, let_through, slopes
from chainzrule_kernels.ops._terms import column, over_channels, over_tangents, plus, times


def backward(
    function: ScalarFunction,
    z: Tensor,
    z_dot: Tensor,
    grads: Optional3,
) -> Optional3:
    """``(dz, dz_dot, dcoeffs)`` in the compute dtype; ``dcoeffs`` is None for a function without coefficients."""
    g_y, g_t, g_q = _gradients(grads)
    f_1, f_2 = slopes(function, z, 2)
    u = plus(g_t, times(2.0, g_q, f_1, z_dot))
    v = over_tangents(times(u, z_dot))
    dz = let_through(function, z, plus(times(g_y, f_1), times(v, f_2)))
    dcoeffs = function.coefficient_gradient(z, (g_y, v)) if isinstance(function, Polynomial) else None
    return dz, let_through(function, z, times(u, f_1)), dcoeffs


def jvp(
    function: ScalarFunction,
    z: Tensor,
    z_dot: Tensor,
    changes: Optional3,
) -> Optional3:
    """The changes of ``(y, y_dot, tangent_sq)`` along a change of ``(z, z_dot, coeffs)``."""
    dz, dz_dot, dcoeffs = changes
    f_1, f_2 = slopes(function, z, 2)
    C_0, C_1, _ = direction(function, dcoeffs, z, 1)
    dy = plus(let_through(function, z, times(f_1, dz)), C_0)
    df_1 = plus(times(f_2, dz), C_1)
    dy_dot = let_through(function, z, plus(times(df_1, z_dot), times(f_1, dz_dot)))
    y_dot = let_through(function, z, times(f_1, z_dot))
    return dy, dy_dot, over_channels(times(2.0, y_dot, dy_dot))


def backward_vjp(
    function: ScalarFunction, z: Tensor, z_dot: Tensor, grads: Optional3, cotangents: Optional3
) -> tuple[Tensor | None, ...]:
    """The gradients of ``S`` with respect to ``(z, z_dot, coeffs, grad_y, grad_y_dot, grad_tangent_sq)``."""
    g_y, g_t, g_q = _gradients(grads)
    a, b, c = cotangents
    f_1, f_2, f_3 = slopes(function, z, 3)
    B_0, B_1, B_2 = direction(function, c, z, 2)
    u = plus(g_t, times(2.0, g_q, f_1, z_dot))
    v = over_tangents(times(u, z_dot))
    at_value = plus(let_through(function, z, times(a, f_1)), B_0)
    at_slope = plus(times(a, f_2), B_1)
    at_tangent = let_through(function, z, plus(times(at_slope, z_dot), times(b, f_1)))  # dS/du_t
    at_square = times(2.0, g_q, z_dot, at_tangent)  # dS/df' through u
    dz = plus(
        times(g_y, at_slope),
        times(v, plus(times(a, f_3), B_2)),
        over_tangents(times(b, u, f_2)),
        over_tangents(times(at_square, f_2)),
    )
    dz = let_through(function, z, dz)
    dz_dot = let_through(function, z, plus(times(u, at_slope), times(2.0, g_q, f_1, at_tangent)))
    dcoeffs = None
    if isinstance(function, Polynomial):
        slope_weight = plus(times(g_y, a), over_tangents(times(b, u)), over_tangents(at_square))
        dcoeffs = function.coefficient_gradient(z, (None, slope_weight, times(v, a)))
    y_dot = let_through(function, z, times(f_1, z_dot))
    return dz, dz_dot, dcoeffs, at_value, at_tangent, over_channels(times(2.0, y_dot, at_tangent))


def backward_jvp(
    function: ScalarFunction,
    z: Tensor,
    z_dot: Tensor,
    grads: Optional3,
    changes: Optional3,
    grads_changes: Optional3,
) -> Optional3:
    """The changes of ``(dz, dz_dot, dcoeffs)`` along changes of the inputs and of the gradients that arrive."""
    g_y, g_t, g_q = _gradients(grads)
    dg_y, dg_t, dg_q = _gradients(grads_changes)
    dz, dz_dot, dcoeffs = changes
    f_1, f_2, f_3 = slopes(function, z, 3)
    _, C_1, C_2 = direction(function, dcoeffs, z, 2)
    df_1 = plus(times(f_2, dz), C_1)
    df_2 = plus(times(f_3, dz), C_2)
    u = plus(g_t, times(2.0, g_q, f_1, z_dot))
    du = plus(dg_t, times(2.0, dg_q, f_1, z_dot), times(2.0, g_q, df_1, z_dot), times(2.0, g_q, f_1, dz_dot))
    v = over_tangents(times(u, z_dot))
    dv = over_tangents(plus(times(du, z_dot), times(u, dz_dot)))
    result_z = plus(times(dg_y, f_1), times(g_y, df_1), times(dv, f_2), times(v, df_2))
    result_z = let_through(function, z, result_z)
    result_z_dot = let_through(function, z, plus(times(du, f_1), times(u, df_1)))
    result_coeffs = None
    if isinstance(function, Polynomial):
        result_coeffs = function.coefficient_gradient(z, (dg_y, plus(times(g_y, dz), dv), times(v, dz)))
    return result_z, result_z_dot, result_coeffs


def _gradients(grads: Optional3) -> Optional3:
    """``g_y``, ``g_t``, ``g_q`` as a column."""
    return grads[0], grads[1], column(grads[2])

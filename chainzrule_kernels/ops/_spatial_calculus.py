r"""Derivatives of ``y = f(z)``, ``jac_sq = Σ_{c,h,w} f'(z)² tap_sq`` for any scalar function ``f`` (SPEC 2.4).

Plain PyTorch. With the channels last, every position of a feature map is a sample of the plain ops
(``_dreg_calculus``), whose norms then add up to one for each image. So these are the formulas from there, with
``z (B, C, *spatial)`` moved to ``(B, *spatial, C)``, ``tap_sq (C, *spatial)`` to ``(*spatial, C)``, and the gradient
``(B,)`` of the norm handed to every position.
"""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions import ScalarFunction
from chainzrule_kernels.functions.sums import sum_over_trailing
from chainzrule_kernels.ops import _dreg_calculus
from chainzrule_kernels.ops._dreg_calculus import Optional3


def backward(function: ScalarFunction, z: Tensor, tap_sq: Tensor | None, grads: Optional3) -> Optional3:
    """``(dz, dtap_sq, dcoeffs)`` in the compute dtype."""
    dz, dtap_sq, dcoeffs = _dreg_calculus.backward(function, *_parameters(z, tap_sq), _results(grads, z))
    return _maps(dz), _taps(dtap_sq), dcoeffs


def jvp(function: ScalarFunction, z: Tensor, tap_sq: Tensor | None, changes: Optional3) -> Optional3:
    """The tangents of ``(y, jac_sq)`` along a change of ``(z, tap_sq, coeffs)``."""
    y_dot, jac_sq_dot, _ = _dreg_calculus.jvp(function, *_parameters(z, tap_sq), _of_parameters(changes))
    return _maps(y_dot), _norms(jac_sq_dot), None


def backward_vjp(
    function: ScalarFunction, z: Tensor, tap_sq: Tensor | None, grads: Optional3, cotangents: Optional3
) -> tuple[Tensor | None, ...]:
    """The gradients of ``S`` with respect to ``(z, tap_sq, coeffs, grad_y, grad_jac_sq)``, and None."""
    dz, dtap_sq, dcoeffs, dgrad_y, dgrad_jac_sq, _ = _dreg_calculus.backward_vjp(
        function, *_parameters(z, tap_sq), _results(grads, z), _of_parameters(cotangents)
    )
    return _maps(dz), _taps(dtap_sq), dcoeffs, _maps(dgrad_y), _norms(dgrad_jac_sq), None


def backward_jvp(
    function: ScalarFunction,
    z: Tensor,
    tap_sq: Tensor | None,
    grads: Optional3,
    changes: Optional3,
    grads_changes: Optional3,
) -> Optional3:
    """The tangents of ``(dz, dtap_sq, dcoeffs)`` along changes of the inputs and of the gradients that arrive."""
    dz_dot, dtap_sq_dot, dcoeffs_dot = _dreg_calculus.backward_jvp(
        function, *_parameters(z, tap_sq), _results(grads, z), _of_parameters(changes), _results(grads_changes, z)
    )
    return _maps(dz_dot), _taps(dtap_sq_dot), dcoeffs_dot


# ---- to the arrangement of the plain ops -----------------------------------------------------------------------------


def _parameters(z: Tensor, tap_sq: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return z.movedim(1, -1), None if tap_sq is None else tap_sq.movedim(0, -1)


def _of_parameters(values: Optional3) -> Optional3:
    of_z, of_tap_sq, of_coeffs = values
    return (
        None if of_z is None else of_z.movedim(1, -1),
        None if of_tap_sq is None else of_tap_sq.movedim(0, -1),
        of_coeffs,
    )


def _results(values: Optional3, z: Tensor) -> Optional3:
    of_y, of_jac_sq, _ = values
    return (
        None if of_y is None else of_y.movedim(1, -1),
        None if of_jac_sq is None else of_jac_sq.reshape(-1, *[1] * (z.dim() - 2)),
        None,
    )


# ---- and back --------------------------------------------------------------------------------------------------------


def _maps(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.movedim(-1, 1)


def _taps(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.movedim(-1, 0)


def _norms(value: Tensor | None) -> Tensor | None:
    return None if value is None else sum_over_trailing(value)

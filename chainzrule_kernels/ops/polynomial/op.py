"""The public function and the registered operator. Its backward is that of ``polynomial_dreg`` without the norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainzrule_kernels import _checks, backends
from chainzrule_kernels._registration import Operator
from chainzrule_kernels.functions import compute_dtype, polynomial_of
from chainzrule_kernels.ops import _dreg_calculus
from chainzrule_kernels.ops._feature_maps import channels_innermost
from chainzrule_kernels.ops.polynomial import definition
from chainzrule_kernels.ops.polynomial_dreg.op import operators as dreg_operators


def polynomial(z: Tensor, coeffs: Tensor, *, rectified: bool = False) -> Tensor:
    r"""A polynomial of every element: ``p(z) = c0 + c1 z + … + cD z^D``, or ``p(relu(z))`` (SPEC 2.1).

    Args:
        z: ``(..., N)``, any strides; float32, float64, bfloat16 or float16.
        coeffs: ``(D+1,)``, shared by the channels, or ``(D+1, N)``, one polynomial for each; ascending powers,
            ``1 <= D <= 8``. May have another dtype than ``z``.
        rectified: whether to apply the polynomial to ``relu(z)``: PolyReLU (PolyCom, arXiv 2411.03884). The derivatives
            are then 0 for ``z <= 0``, as those of PyTorch's relu.

    Returns:
        ``y`` with the shape and dtype of ``z``; contiguous, except that with shared coefficients feature maps keep
        their channels innermost (``torch.channels_last``). Arithmetic is in float32 (float64 for float64 ``z``), by
        Horner's rule.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.

    Differentiable any number of times in ``z`` and ``coeffs``; only ``z`` is saved for the backward.
    """
    check(z, coeffs, rectified=rectified)
    if coeffs.dim() == 1 and channels_innermost(z):
        # Every element is treated alike, so that the channels may as well be in the last dimension.
        return polynomial(z.movedim(1, -1), coeffs, rectified=rectified).movedim(-1, 1)
    if backends.choose("polynomial", z) == "reference":
        return definition.polynomial(z, coeffs, rectified=rectified)
    return operator(z, coeffs, rectified)


def check(z: Tensor, coeffs: Tensor, *, rectified: bool = False) -> None:
    """Raise for arguments that :func:`polynomial` cannot take."""
    _checks.check_z(z)
    _checks.check_coeffs(coeffs, z)
    _checks.check_flag("rectified", rectified)


def _fake(z: Tensor, coeffs: Tensor, rectified: bool) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _vjp(inputs: tuple[Any, ...], needs: tuple[bool, ...], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    z, coeffs, rectified = inputs
    needs_z, needs_coeffs = needs
    dz, _, dcoeffs = dreg_operators.backward(
        z, None, coeffs, grads[0], None, None, rectified, needs_z, False, needs_coeffs
    )
    return dz, dcoeffs


def _jvp(inputs: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> Sequence[Tensor]:
    z, coeffs, rectified = inputs
    dtype = compute_dtype(z)
    z_dot, coeffs_dot = (None if tangent is None else tangent.to(dtype) for tangent in tangents)
    function = polynomial_of(coeffs.to(dtype), rectified)
    y_dot, _, _ = _dreg_calculus.jvp(function, z.to(dtype), None, (z_dot, None, coeffs_dot))
    return (torch.zeros_like(z) if y_dot is None else y_dot.to(z.dtype),)


def _operator_definition(z: Tensor, coeffs: Tensor, rectified: bool) -> Tensor:
    return definition.polynomial(z, coeffs, rectified=rectified)


operator = Operator(
    "polynomial(Tensor z, Tensor coeffs, bool rectified) -> Tensor",
    definition=_operator_definition,
    fake=_fake,
    vjp=_vjp,
    jvp=_jvp,
)

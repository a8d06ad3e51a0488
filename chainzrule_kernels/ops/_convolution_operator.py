"""The registered operator behind the four convolution ops, for one and two spatial dimensions and every backend.

Its vjp takes the gradient through the polynomial from the stored ``s`` (the backward operator of
``polynomial_spatial_dreg``) and leaves the rest to PyTorch's ``convolution_backward``. Since ``s`` is an output,
a second derivative arrives at it as a gradient, and passes through the same formulas again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainzrule_kernels import _checks, backends
from chainzrule_kernels._registration import Operator, library, may_be_differentiated
from chainzrule_kernels.functions import Polynomial, compute_dtype
from chainzrule_kernels.ops import _spatial_calculus
from chainzrule_kernels.ops._convolution import Numbers, Padding, convolved, out_size, without_autocast
from chainzrule_kernels.ops._convolution_definition import (
    operator_arguments,
    polynomial_conv,
    polynomial_convolution,
    without_added_batch,
)
from chainzrule_kernels.ops._feature_maps import channels_innermost
from chainzrule_kernels.ops._terms import plus
from chainzrule_kernels.ops.polynomial_spatial_dreg.op import operators as spatial_operators
from chainzrule_kernels.ops.squared_weights.op import squared_taps


def convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coeffs: Tensor,
    stride: Numbers,
    padding: Padding,
    dilation: Numbers,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Serve a call of a public op, whose arguments have been checked. Without the norm ``jac_sq`` is empty."""
    with_norm = op.endswith("_dreg")
    call = (x, weight, bias, coeffs, stride, padding, dilation, groups)
    backend = backends.choose(op, *call)
    if backend == "reference":
        return polynomial_conv(*call, with_norm)
    arguments = operator_arguments(*call, with_norm, squared_taps)
    if backend == "triton":
        data, weight_in_dtype, bias_in_dtype, _, tap_sq, *where, _ = arguments
        with without_autocast(x.device):
            s = convolved(data, weight_in_dtype, bias_in_dtype, *where)
        y, jac_sq = spatial_operators.forward(s, tap_sq, coeffs, False)
        jac_sq = jac_sq if with_norm else s.new_empty(0)
    else:
        y, jac_sq, _ = operator(*arguments, may_be_differentiated(*arguments))
    return without_added_batch(x, weight, y, jac_sq)


def check(
    dimensions: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coeffs: Tensor,
    stride: Numbers,
    padding: Padding,
    dilation: Numbers,
    groups: int,
) -> None:
    """Raise for arguments that the op with so many spatial dimensions cannot take."""
    _checks.check_convolution(dimensions, x, weight, bias, stride, padding, dilation, groups)
    _checks.check_coeffs(coeffs, x, channels=weight.shape[0])


def innermost(x: Tensor, weight: Tensor) -> bool:
    """Whether the results have their channels innermost: where the library's convolution prefers them so too."""
    return channels_innermost(x) or channels_innermost(weight)


def _arrange(inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    x, weight = inputs[:2]
    if output.dim() == x.dim() and innermost(x, weight):
        return output.movedim(1, -1).contiguous().movedim(-1, 1)
    return output.contiguous()


def out_shape(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    """The shape of ``s`` and ``y``."""
    shape = [x.shape[0], weight.shape[0]]
    for size, taps, step, pad, apart in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        shape.append(out_size(size, taps, step, 2 * pad, apart))
    return shape


def _fake(x: Tensor, weight: Tensor, bias: Any, coeffs: Any, tap_sq: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, _, with_norm, keep_s = rest
    y = x.new_empty(out_shape(x, weight, stride, padding, dilation))
    jac_sq = x.new_empty(x.shape[:1] if with_norm else (0,), dtype=compute_dtype(x))
    return y, jac_sq, torch.empty_like(y) if keep_s else x.new_empty(0)


def _vjp(inputs: tuple[Any, ...], needs: tuple[bool, ...], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    x, weight, bias, coeffs, tap_sq, stride, padding, dilation, groups, with_norm, keep_s, s = inputs
    where = (stride, padding, dilation, groups)
    needs_x, needs_weight, needs_bias, needs_coeffs, needs_tap_sq = needs
    needs_s = needs_x or needs_weight or needs_bias
    grad_y, grad_jac_sq, grad_s = grads
    if not with_norm:
        grad_jac_sq = None
    dtype = compute_dtype(x) if x.device.type == "cpu" else x.dtype
    with without_autocast(x.device):
        if not keep_s:
            s, grad_s = _convolved_in(dtype, x, weight, bias, *where).to(x.dtype), None
        ds, dtap_sq, dcoeffs = None, None, None
        if grad_y is not None or grad_jac_sq is not None:
            ds, dtap_sq, dcoeffs = spatial_operators.backward(
                s, tap_sq, coeffs, grad_y, grad_jac_sq, False, needs_s, needs_tap_sq, needs_coeffs
            )
        ds = plus(ds if needs_s else None, grad_s)
        if ds is None or not needs_s:
            return None, None, None, dcoeffs, dtap_sq
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            ds.to(dtype),
            x.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.shape,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [needs_x, needs_weight, needs_bias],
        )
    wanted = zip((dx, dweight, dbias), (x, weight, bias), needs, strict=False)
    return (*(value.to(like.dtype) if need else None for value, like, need in wanted), dcoeffs, dtap_sq)


def _convolved_in(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    return convolved(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *where)


def _jvp(inputs: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> Sequence[Tensor]:
    x, weight, bias, coeffs, tap_sq, stride, padding, dilation, groups, with_norm, keep_s, s = inputs
    x_dot, weight_dot, bias_dot, coeffs_dot, tap_sq_dot = tangents
    where = (stride, padding, dilation, groups)
    dtype = compute_dtype(x)
    with without_autocast(x.device):
        if not keep_s:
            s = _convolved_in(dtype, x, weight, bias, *where)
        s_dot = plus(
            None if x_dot is None else _convolved_in(dtype, x_dot, weight, None, *where),
            None if weight_dot is None else _convolved_in(dtype, x, weight_dot, None, *where),
            None if bias_dot is None else bias_dot.to(dtype).reshape(-1, *[1] * len(stride)).expand(s.shape),
        )
        changes = (s_dot, _in(dtype, tap_sq_dot), _in(dtype, coeffs_dot))
        y_dot, jac_sq_dot, _ = _spatial_calculus.jvp(
            Polynomial(coeffs.to(dtype)), s.to(dtype), _in(dtype, tap_sq), changes
        )
    return (
        torch.zeros_like(s, dtype=x.dtype) if y_dot is None else y_dot.to(x.dtype),
        _or_zeros(jac_sq_dot, s.new_empty(s.shape[0], dtype=dtype)) if with_norm else s.new_empty(0, dtype=dtype),
        _or_zeros(s_dot, s).to(x.dtype) if keep_s else x.new_empty(0),
    )


def _in(dtype: torch.dtype, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _or_zeros(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


operator = Operator(
    "polynomial_convolution(Tensor x, Tensor weight, Tensor? bias, Tensor coeffs, Tensor? tap_sq, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool with_norm, bool keep_s) -> (Tensor, Tensor, Tensor)",
    definition=polynomial_convolution,
    fake=_fake,
    vjp=_vjp,
    jvp=_jvp,
    saves=(2,),
    arrange=_arrange,
)

# What the CPU kernel (_convolution_cpu.py) asks of the compiled module: without derivatives, and for nobody else.
library.define("_empty_for_results(Tensor like, int[] sizes) -> Tensor")
library.define(
    "_polynomial_convolution_block(Tensor s, Tensor? tap_sq, Tensor coeffs, Tensor(a!) y, Tensor(b!)? jac_sq, "
    "Tensor(c!)? kept_s) -> ()"
)

"""The definition of a convolution with its polynomial and Jacobian norm, in plain PyTorch (SPEC 2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from chainzrule_kernels.functions import Polynomial, compute_dtype
from chainzrule_kernels.ops._convolution import (
    Geometry,
    Numbers,
    Padding,
    convolved,
    dtype_of_convolution,
    geometry,
    in_dtype,
    with_uneven_padding,
    without_autocast,
)
from chainzrule_kernels.ops._spatial_definition import spatial_dreg
from chainzrule_kernels.ops.squared_weights.definition import squared_taps

OperatorArguments = tuple[Any, ...]
SquaredTaps = Callable[[Tensor, Tensor, Geometry], Tensor]


def operator_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coeffs: Tensor,
    stride: Numbers,
    padding: Padding,
    dilation: Numbers,
    groups: int,
    with_norm: bool,
    squares: SquaredTaps,
) -> OperatorArguments:
    """The arguments of a public convolution op as ``polynomial_convolution`` takes them, but for ``keep_s``.

    ``x`` with a batch dimension and with the padding that differs between two sides; weight and bias in the dtype of
    the convolution; the squared taps of the weight as it was given, not of a rounded copy, by ``squares``.
    """
    dtype = dtype_of_convolution(x)
    where = geometry(weight.shape[2:], stride, padding, dilation)
    if x.dim() < weight.dim():
        x = x.unsqueeze(0)
    x = in_dtype(x, dtype)
    tap_sq = None
    if with_norm:
        with without_autocast(x.device):
            tap_sq = squares(weight, x, where)
    return (
        with_uneven_padding(x, where),
        in_dtype(weight, dtype),
        None if bias is None else in_dtype(bias, dtype),
        coeffs,
        tap_sq,
        list(where.stride),
        where.even_padding,
        list(where.dilation),
        groups,
        with_norm,
    )


def polynomial_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, coeffs: Tensor, tap_sq: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``s = conv(x, W) + b``, ``y = p(s)``, ``jac_sq = Σ_{o,h,w} p'(s)² tap_sq``.

    ``y`` and ``jac_sq`` come from the sums in the compute dtype. ``s`` is returned rounded to the dtype of ``x``: what
    a kernel keeps, and from which it takes its gradients. (PyTorch's gradients of this definition come from the sums.)
    """
    *where, with_norm, keep_s = rest
    dtype = compute_dtype(x)
    with without_autocast(x.device):
        s = convolved(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *where)
        polynomial = Polynomial(coeffs.to(dtype))
        if with_norm:
            y, jac_sq = spatial_dreg(lambda _: polynomial, s, tap_sq)
        else:
            (value,) = polynomial.derivatives(s.movedim(1, -1), 0)
            y, jac_sq = value.movedim(-1, 1), s.new_empty(0)
    return y.to(x.dtype), jac_sq, s.to(x.dtype) if keep_s else x.new_empty(0)


def polynomial_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coeffs: Tensor,
    stride: Numbers,
    padding: Padding,
    dilation: Numbers,
    groups: int,
    with_norm: bool,
) -> tuple[Tensor, Tensor]:
    """The definition of the four public ops; without the norm ``jac_sq`` is empty."""
    arguments = operator_arguments(x, weight, bias, coeffs, stride, padding, dilation, groups, with_norm, squared_taps)
    y, jac_sq, _ = polynomial_convolution(*arguments, False)
    return without_added_batch(x, weight, y, jac_sq)


def without_added_batch(x: Tensor, weight: Tensor, y: Tensor, jac_sq: Tensor) -> tuple[Tensor, Tensor]:
    """The results, without the batch dimension that was added to an ``x`` that has none."""
    return (y, jac_sq) if x.dim() == weight.dim() else (y.squeeze(0), jac_sq.squeeze(0))

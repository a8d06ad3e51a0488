"""The CPU kernel of ``polynomial_convolution``: the library's convolution by blocks, and behind each the compiled pass.

A block is as many samples as fit into the cache: their sums ``s`` are still there when the polynomial, its derivative
and the norm are taken, and what is written to memory is ``y``, and ``s`` where it is kept. A batch that hardly leaves
the cache is one call of the library; in inference ``y`` then takes the place of ``s``. Half precision is convolved in
float32, block by block. How the batch is cut depends on the shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.ops._convolution import convolved, in_dtype, without_autocast
from chainzrule_kernels.ops._convolution_operator import innermost, operator, out_shape

ELEMENTS_AT_ONCE = 1 << 22
"""Of the result of one call for the whole batch: 16 MiB of float32. A block would be copied to its place in ``y``."""

ELEMENTS_PER_BLOCK = 1 << 21
"""Of the result: 8 MiB of float32, which a third-level cache holds. Smaller blocks cost more calls than they save."""

# The overloads themselves: to find them at each call costs as much as a small convolution's polynomial.
_empty_for_results = torch.ops.chainzrule_kernels._empty_for_results.default
_apply_polynomial = torch.ops.chainzrule_kernels._polynomial_convolution_block.default
BlockConvolution = Callable[[Tensor], Tensor]


def polynomial_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, coeffs: Tensor, tap_sq: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on CPU tensors."""
    *where, with_norm, keep_s = rest
    dtype = compute_dtype(x)
    shape = out_shape(x, weight, *where[:3])
    batch = shape[0]
    channels_last = innermost(x, weight)
    jac_sq = x.new_empty(batch if with_norm else 0, dtype=dtype)
    per_sample = max(1, math.prod(shape[1:]))
    weight = in_dtype(weight, dtype)
    bias = None if bias is None else in_dtype(bias, dtype).contiguous()
    coeffs = in_dtype(coeffs, dtype).contiguous()
    tap_sq = None if tap_sq is None else in_dtype(tap_sq, dtype)
    with without_autocast(x.device):
        if x.dtype == dtype and 0 < batch * per_sample <= ELEMENTS_AT_ONCE:
            s = _laid_out(convolved(x, weight, bias, *where), channels_last)
            y = _empty(x, shape, channels_last) if keep_s else s
            _apply_polynomial(s, tap_sq, coeffs, y, jac_sq if with_norm else None, None)
            return y, jac_sq, s if keep_s else x.new_empty(0)
        y = _empty(x, shape, channels_last)
        s = _empty(x, shape, channels_last) if keep_s else x.new_empty(0)
        block = max(1, min(ELEMENTS_PER_BLOCK // per_sample, batch))
        convolve = _block_convolution(x, weight, bias, block, channels_last, *where)
        for begin in range(0, batch, block):
            count = min(block, batch - begin)
            _apply_polynomial(
                convolve(x.narrow(0, begin, count).to(dtype)),
                tap_sq,
                coeffs,
                y.narrow(0, begin, count),
                jac_sq.narrow(0, begin, count) if with_norm else None,
                s.narrow(0, begin, count) if keep_s else None,
            )
    return y, jac_sq, s


def _empty(x: Tensor, shape: list[int], channels_last: bool) -> Tensor:
    if channels_last:
        return _empty_for_results(x, [shape[0], *shape[2:], shape[1]]).movedim(-1, 1)
    return _empty_for_results(x, shape)


def _block_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: int, channels_last: bool, *where: Any
) -> BlockConvolution:
    """The convolution of a block of samples, its result laid out as ``y`` is.

    oneDNN arranges the weight anew at each call unless it is handed an arranged one; for a block of small images that
    costs as much as the convolution. PyTorch has such a call for two spatial dimensions in float32.
    """
    if not _onednn(weight):
        return lambda samples: _laid_out(convolved(samples, weight, bias, *where), channels_last)
    if x.dim() == 4:
        return _arranged_convolution(x, weight, bias, block, channels_last, *where)
    stride, padding, dilation, groups = where
    plane = ([1, *stride], [0, *padding], [1, *dilation], groups)
    convolve = _arranged_convolution(x.unsqueeze(2), weight.unsqueeze(2), bias, block, channels_last, *plane)
    return lambda samples: convolve(samples.unsqueeze(2)).squeeze(2)


def _onednn(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def _arranged_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: int, channels_last: bool, *where: Any
) -> BlockConvolution:
    stride, padding, dilation, groups = where
    arranged = torch.ops.aten.mkldnn_reorder_conv2d_weight(
        weight.contiguous().to_mkldnn(), padding, stride, dilation, groups, [block, *x.shape[1:]]
    )
    if channels_last:
        pointwise = torch.ops.mkldnn._convolution_pointwise
        return lambda samples: _laid_out(
            pointwise(samples, arranged, bias, padding, stride, dilation, groups, "none", [], ""), True
        )
    return lambda samples: _laid_out(
        torch.ops.aten.mkldnn_convolution(samples, arranged, bias, padding, stride, dilation, groups), False
    )


def _laid_out(s: Tensor, channels_last: bool) -> Tensor:
    return s.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else s.contiguous()


def register() -> None:
    """Make this the operator's kernel for CPU tensors. The compiled module must be loaded."""
    operator.register_python_kernel(polynomial_convolution)

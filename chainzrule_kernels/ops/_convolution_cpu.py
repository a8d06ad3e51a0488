"""The CPU kernel of ``polynomial_convolution``: the library's convolution by blocks, and behind each the compiled pass.

A block is a few samples: its sums ``s`` are still in the cache when the polynomial, its derivative and the norm are
taken. What is written to memory is ``y``, and ``s`` where it is kept. Half precision is convolved in float32, block by
block. How the batch is cut depends on the shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chainzrule_kernels._registration import library
from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.ops._convolution import convolved, without_autocast
from chainzrule_kernels.ops._convolution_operator import innermost, out_shape

ELEMENTS_PER_BLOCK = 1 << 18
"""Of the result: 1 MiB of float32, about the second-level cache of a core."""

_private = torch.ops.chainzrule_kernels
BlockConvolution = Callable[[Tensor], Tensor]


def polynomial_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, coeffs: Tensor, tap_sq: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on CPU tensors."""
    *where, with_norm, keep_s = rest
    dtype = compute_dtype(x)
    shape = out_shape(x, weight, *where[:3])
    channels_last = innermost(x, weight)
    y = _empty(x, shape, channels_last)
    s = _empty(x, shape, channels_last) if keep_s else x.new_empty(0)
    jac_sq = x.new_empty(shape[0] if with_norm else 0, dtype=dtype)
    per_sample = max(1, y[0].numel() if shape[0] else 1)
    block = max(1, min(ELEMENTS_PER_BLOCK // per_sample, shape[0]))
    with without_autocast(x.device):
        convolve = _block_convolution(
            x, weight.to(dtype), None if bias is None else bias.to(dtype).contiguous(), block, channels_last, *where
        )
        coeffs = coeffs.to(dtype).contiguous()
        tap_sq = None if tap_sq is None else tap_sq.to(dtype)
        for begin in range(0, shape[0], block):
            count = min(block, shape[0] - begin)
            _private._polynomial_convolution_block(
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
        return _private._empty_for_results(x, [shape[0], *shape[2:], shape[1]]).movedim(-1, 1)
    return _private._empty_for_results(x, shape)


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


library.impl("polynomial_convolution", polynomial_convolution, "CPU")

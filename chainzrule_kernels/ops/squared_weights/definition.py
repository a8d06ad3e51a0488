r"""The squares of a weight, which the Jacobian norms weigh the slopes with, in plain PyTorch (SPEC 2.2 and 2.4).

* Of a linear map, and of a convolution without padding: ``r_j = Σ W_j²``.
* Of a padded convolution, for each element of its result the sum over the taps that fall inside the image:
  ``g_{o,p,q} = Σ_{i,j} a_{p,i} b_{q,j} Σ_c W_{o,c,i,j}²`` with ``a_{p,i} = 1`` where tap ``i`` of window ``p`` falls
  inside the image and 0 where it falls on the padding, and ``b`` likewise for the other dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.functions.sums import sum_over_trailing
from chainzrule_kernels.ops._convolution import Geometry, out_size, without_autocast


def squared_row_norms(weight: Tensor, z: Tensor) -> Tensor:
    """``‖W_j‖²`` of the given weight (not of a rounded copy), in the dtype in which an op on ``z`` computes."""
    weight = weight.to(compute_dtype(z))
    return row_products(weight, weight)


def squared_taps(weight: Tensor, x: Tensor, where: Geometry) -> Tensor:
    """For each element of the convolution's result the sum of ``W²`` over the taps that fall inside the image.

    Args:
        weight: ``(K, C / groups, *window)``.
        x: ``(B, C, *spatial)`` or ``(C, *spatial)``, of which only shape, dtype and device count.
        where: the windows.

    Returns:
        ``(K, *out)``, or ``(K,)`` where there is no padding: every tap is then inside. In the dtype in which an op on
        ``x`` computes; differentiable in ``weight``.
    """
    weight = weight.to(compute_dtype(x))
    if not where.padded:
        return row_products(weight, weight)
    return tap_products(weight, weight, x.shape[x.dim() - len(where.stride) :], where)


def row_products(weight: Tensor, other: Tensor) -> Tensor:
    """``Σ W_j V_j`` over all that belongs to unit ``j``: ``(K, ...) -> (K,)``."""
    return sum_over_trailing(weight * other)


def tap_products(weight: Tensor, other: Tensor, size: Sequence[int], where: Geometry) -> Tensor:
    """``Σ W V`` over the taps that fall inside an image of ``size``: ``(K, C, *window) -> (K, *out)``."""
    sums = (weight * other).sum(1)
    with without_autocast(weight.device):
        for dimension, length in enumerate(size):
            inside = _inside(length, weight.shape[2 + dimension], where, dimension, weight.device)
            # The first dimension behind K is the one whose taps are summed; its windows go to the end.
            sums = sums.movedim(1, -1) @ inside.to(sums.dtype)
    return sums


def of_taps(values: Tensor, window: Sequence[int], size: Sequence[int], where: Geometry) -> Tensor:
    """The transpose of the sums over taps: for each tap the sum of ``values (K, *out)`` over its windows."""
    sums = values
    with without_autocast(values.device):
        for dimension, length in enumerate(size):
            inside = _inside(length, window[dimension], where, dimension, values.device)
            sums = sums.movedim(1, -1) @ inside.to(sums.dtype).t()
    return sums


def _inside(size: int, taps: int, where: Geometry, dimension: int, device: torch.device) -> Tensor:
    """``(taps, windows)``: whether each tap of each window falls inside the image, in one dimension."""
    low, high = where.padding[dimension]
    stride, dilation = where.stride[dimension], where.dilation[dimension]
    windows = out_size(size, taps, stride, low + high, dilation)
    begin = torch.arange(windows, device=device) * stride - low
    place = begin + torch.arange(taps, device=device)[:, None] * dilation
    return (place >= 0) & (place < size)

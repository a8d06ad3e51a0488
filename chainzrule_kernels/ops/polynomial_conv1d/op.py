"""The public function. The registered operator is that of all four convolution ops."""

from __future__ import annotations

import functools

from torch import Tensor

from chainzrule_kernels.ops import _convolution_operator
from chainzrule_kernels.ops._convolution import Numbers, Padding


def polynomial_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coeffs: Tensor,
    stride: Numbers = 1,
    padding: Padding = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    r"""A convolution and a polynomial of its result: polynomial-kernel convolution.

    ``s = conv(x, W) + b``, ``y = p(s)`` with ``p(s) = c0 + c1 s + … + cD s^D`` (SPEC 2.4; Kervolutional networks, arXiv
    1904.03955; PolyKervNets, arXiv 2312.15229). Outside the image ``s = b``, so on a border of nothing but padding
    ``y = p(b)``, not 0.

    Args:
        x: ``(B, C, L)`` or ``(C, L)``, any strides; float32, float64, bfloat16 or float16.
        weight: ``(K, C / groups, *window)``, as in :func:`torch.nn.functional.conv1d`; used in the dtype of ``x``.
        bias: ``(K,)`` or None.
        coeffs: ``(D+1,)``, shared by the filters, or ``(D+1, K)``, one polynomial for each; ascending powers,
            ``1 <= D <= 8``.
        stride: between windows, a number.
        padding: zeros on both sides, a number; a pair ``(before, behind)`` for each dimension;
            ``"same"`` or ``"valid"``.
        dilation: between the taps of a window, a number.
        groups: in how many parts the channels of ``x`` and the filters are divided.

    Returns:
        ``y (B, K, L')``, without ``B`` if ``x`` has none, in the dtype of the convolution, which is that of ``x``, or
        under autocast the autocast dtype. Its channels are innermost in memory (``torch.channels_last``) if
        those of ``x`` or of ``weight`` are; otherwise it is contiguous.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.

    ``y`` comes from the sums of the convolution in float32 (float64 for float64 ``x``). For the backward ``s`` is kept,
    rounded to the dtype of ``x``, beside ``x`` and the parameters; where nothing is to be differentiated it is not even
    written. On a GPU without the CUDA kernel the library rounds ``s`` before the polynomial sees it. Differentiable any
    number of times in every tensor argument.
    """
    check(x, weight, bias, coeffs, stride, padding, dilation, groups)
    y, _ = _convolution_operator.convolution(
        "polynomial_conv1d", x, weight, bias, coeffs, stride, padding, dilation, groups
    )
    return y


check = functools.partial(_convolution_operator.check, 1)
"""Raises for arguments that :func:`polynomial_conv1d` cannot take."""

"""The public function. The registered operator is that of all four convolution ops."""

from __future__ import annotations

import functools

from torch import Tensor

from chainzrule_kernels.ops import _convolution_operator
from chainzrule_kernels.ops._convolution import Numbers, Padding


def polynomial_conv1d_dreg(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coeffs: Tensor,
    stride: Numbers = 1,
    padding: Padding = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""A convolution, a polynomial of its result, and the exact norm of the layer's Jacobian for each sample.

    ``s = conv(x, W) + b``, ``y = p(s)`` with ``p(s) = c0 + c1 s + … + cD s^D``, and for each sample
    ``jac_sq = ‖∂y/∂x‖_F² = Σ_{o,h,w} p'(s_{o,h,w})² g_{o,h,w}``, with ``g_{o,h,w}`` the sum of ``W_o²`` over the taps
    that fall inside the image: a tap on the padding does not depend on ``x`` (SPEC 2.4; PolyKervNets, arXiv 2312.15229;
    DREG, arXiv 2606.23942).

    Args:
        x: ``(B, C, L)`` or ``(C, L)``, any strides; float32, float64, bfloat16 or float16.
        weight: ``(K, C / groups, *window)``, as in :func:`torch.nn.functional.conv1d`; used in the dtype of ``x``,
            its squares in float32 or better.
        bias: ``(K,)`` or None.
        coeffs: ``(D+1,)``, shared by the filters, or ``(D+1, K)``, one polynomial for each; ascending powers,
            ``1 <= D <= 8``.
        stride: between windows, a number.
        padding: zeros on both sides, a number; a pair ``(before, behind)`` for each dimension;
            ``"same"`` or ``"valid"``.
        dilation: between the taps of a window, a number.
        groups: in how many parts the channels of ``x`` and the filters are divided.

    Returns:
        ``(y, jac_sq)``: ``y (B, K, L')`` in the dtype of the convolution, which is that of ``x``, or under autocast the
        autocast dtype; ``jac_sq (B,)`` in float32, float64 for float64 ``x``. For ``x`` without a batch dimension
        neither has one. The channels of ``y`` are innermost in memory (``torch.channels_last``) if those of ``x`` or of
        ``weight`` are; otherwise it is contiguous.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.

    ``y`` comes from the sums of the convolution in float32 (float64 for float64 ``x``). For the backward ``s`` is kept,
    rounded to the dtype of ``x``, beside ``x`` and the parameters; where nothing is to be differentiated it is not even
    written. On a GPU without the CUDA kernel the library rounds ``s`` before the polynomial sees it. Differentiable any
    number of times in every tensor argument, ``weight`` through the norm as well.
    """
    check(x, weight, bias, coeffs, stride, padding, dilation, groups)
    return _convolution_operator.convolution(
        "polynomial_conv1d_dreg", x, weight, bias, coeffs, stride, padding, dilation, groups
    )


check = functools.partial(_convolution_operator.check, 1)
"""Raises for arguments that :func:`polynomial_conv1d_dreg` cannot take."""

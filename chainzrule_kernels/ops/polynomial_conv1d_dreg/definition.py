"""``s = conv(x, W) + b``, ``y = p(s)``, ``jac_sq = Σ_{o,h,w} p'(s)² g_{o,h,w}``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.ops._convolution import Numbers, Padding
from chainzrule_kernels.ops._convolution_definition import polynomial_conv


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
    """The executable definition of :func:`chainzrule_kernels.polynomial_conv1d_dreg`: same arguments and dtypes."""
    return polynomial_conv(x, weight, bias, coeffs, stride, padding, dilation, groups, True)

"""``s = conv(x, W) + b``, ``y = p(s)``, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.ops._convolution import Numbers, Padding
from chainzrule_kernels.ops._convolution_definition import polynomial_conv


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
    """The executable definition of :func:`chainzrule_kernels.polynomial_conv1d`: same arguments, shapes and dtypes."""
    y, _ = polynomial_conv(x, weight, bias, coeffs, stride, padding, dilation, groups, False)
    return y

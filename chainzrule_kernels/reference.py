"""Plain-PyTorch definitions of every op: what the kernels must compute, in any floating dtype, on any device.

Each function has the arguments, shapes and dtypes of the public op of the same name and is differentiated by PyTorch
itself. Computing in float64 is a matter of passing float64.
"""

from chainzrule_kernels.ops.activation_dreg.definition import activation_dreg
from chainzrule_kernels.ops.activation_spatial_dreg.definition import activation_spatial_dreg
from chainzrule_kernels.ops.activation_tangent.definition import activation_tangent
from chainzrule_kernels.ops.linear_activation_dreg.definition import linear_activation_dreg
from chainzrule_kernels.ops.linear_polynomial_dreg.definition import linear_polynomial_dreg
from chainzrule_kernels.ops.polynomial.definition import polynomial
from chainzrule_kernels.ops.polynomial_conv1d.definition import polynomial_conv1d
from chainzrule_kernels.ops.polynomial_conv1d_dreg.definition import polynomial_conv1d_dreg
from chainzrule_kernels.ops.polynomial_conv2d.definition import polynomial_conv2d
from chainzrule_kernels.ops.polynomial_conv2d_dreg.definition import polynomial_conv2d_dreg
from chainzrule_kernels.ops.polynomial_dreg.definition import polynomial_dreg
from chainzrule_kernels.ops.polynomial_spatial_dreg.definition import polynomial_spatial_dreg
from chainzrule_kernels.ops.polynomial_tangent.definition import polynomial_tangent

__all__ = [
    "activation_dreg",
    "activation_spatial_dreg",
    "activation_tangent",
    "linear_activation_dreg",
    "linear_polynomial_dreg",
    "polynomial",
    "polynomial_conv1d",
    "polynomial_conv1d_dreg",
    "polynomial_conv2d",
    "polynomial_conv2d_dreg",
    "polynomial_dreg",
    "polynomial_spatial_dreg",
    "polynomial_tangent",
]

"""Fused kernels for polynomial layers and layer-Jacobian regularisation (DREG) in PyTorch."""

from chainzrule_kernels import _native as _native
from chainzrule_kernels import _native_cuda as _native_cuda
from chainzrule_kernels import _triton as _triton
from chainzrule_kernels import coefficients, nn, reference, regularisers, schedules
from chainzrule_kernels.backends import Explanation, backend, explain
from chainzrule_kernels.diagnostics import peak_volatility, tail_ratio
from chainzrule_kernels.dreg import DREG, Reduction
from chainzrule_kernels.functions import ACTIVATION_KINDS, MAX_DEGREE
from chainzrule_kernels.monitor import JacobianMonitor, Measurement
from chainzrule_kernels.ops.activation_dreg.op import activation_dreg
from chainzrule_kernels.ops.activation_spatial_dreg.op import activation_spatial_dreg
from chainzrule_kernels.ops.activation_tangent.op import activation_tangent
from chainzrule_kernels.ops.linear_activation_dreg.op import linear_activation_dreg
from chainzrule_kernels.ops.linear_polynomial_dreg.op import linear_polynomial_dreg
from chainzrule_kernels.ops.polynomial.op import polynomial
from chainzrule_kernels.ops.polynomial_conv1d.op import polynomial_conv1d
from chainzrule_kernels.ops.polynomial_conv1d_dreg.op import polynomial_conv1d_dreg
from chainzrule_kernels.ops.polynomial_conv2d.op import polynomial_conv2d
from chainzrule_kernels.ops.polynomial_conv2d_dreg.op import polynomial_conv2d_dreg
from chainzrule_kernels.ops.polynomial_dreg.op import polynomial_dreg
from chainzrule_kernels.ops.polynomial_spatial_dreg.op import polynomial_spatial_dreg
from chainzrule_kernels.ops.polynomial_tangent.op import polynomial_tangent
from chainzrule_kernels.polykervnet import from_polykervnet, polykervnet_report, to_polykervnet
from chainzrule_kernels.swap import swap, unswap

__version__ = "0.1.0"

__all__ = [
    "ACTIVATION_KINDS",
    "DREG",
    "MAX_DEGREE",
    "Explanation",
    "JacobianMonitor",
    "Measurement",
    "Reduction",
    "activation_dreg",
    "activation_spatial_dreg",
    "activation_tangent",
    "backend",
    "coefficients",
    "explain",
    "from_polykervnet",
    "linear_activation_dreg",
    "linear_polynomial_dreg",
    "nn",
    "peak_volatility",
    "polykervnet_report",
    "polynomial",
    "polynomial_conv1d",
    "polynomial_conv1d_dreg",
    "polynomial_conv2d",
    "polynomial_conv2d_dreg",
    "polynomial_dreg",
    "polynomial_spatial_dreg",
    "polynomial_tangent",
    "reference",
    "regularisers",
    "schedules",
    "swap",
    "tail_ratio",
    "to_polykervnet",
    "unswap",
]

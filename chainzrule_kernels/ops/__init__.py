"""One room for each op: its definition in plain PyTorch, the op with its autograd, its kernels, its mathematics."""

from chainzrule_kernels.backends import PublicOp
from chainzrule_kernels.ops.activation_dreg import definition as _activation_dreg_definition
from chainzrule_kernels.ops.activation_dreg import op as _activation_dreg
from chainzrule_kernels.ops.activation_tangent import definition as _activation_tangent_definition
from chainzrule_kernels.ops.activation_tangent import op as _activation_tangent
from chainzrule_kernels.ops.linear_activation_dreg import definition as _linear_activation_dreg_definition
from chainzrule_kernels.ops.linear_activation_dreg import op as _linear_activation_dreg
from chainzrule_kernels.ops.linear_polynomial_dreg import definition as _linear_polynomial_dreg_definition
from chainzrule_kernels.ops.linear_polynomial_dreg import op as _linear_polynomial_dreg
from chainzrule_kernels.ops.polynomial import definition as _polynomial_definition
from chainzrule_kernels.ops.polynomial import op as _polynomial
from chainzrule_kernels.ops.polynomial_dreg import definition as _polynomial_dreg_definition
from chainzrule_kernels.ops.polynomial_dreg import op as _polynomial_dreg
from chainzrule_kernels.ops.polynomial_tangent import definition as _polynomial_tangent_definition
from chainzrule_kernels.ops.polynomial_tangent import op as _polynomial_tangent

PUBLIC_OPS: dict[str, PublicOp] = {
    "polynomial": PublicOp(_polynomial.polynomial, _polynomial.check, _polynomial_definition.polynomial),
    "polynomial_dreg": PublicOp(_polynomial_dreg.polynomial_dreg, _polynomial_dreg.check, _polynomial_dreg_definition.polynomial_dreg),
    "activation_dreg": PublicOp(_activation_dreg.activation_dreg, _activation_dreg.check, _activation_dreg_definition.activation_dreg),
    "polynomial_tangent": PublicOp(_polynomial_tangent.polynomial_tangent, _polynomial_tangent.check, _polynomial_tangent_definition.polynomial_tangent),
    "activation_tangent": PublicOp(_activation_tangent.activation_tangent, _activation_tangent.check, _activation_tangent_definition.activation_tangent),
    "linear_polynomial_dreg": PublicOp(_linear_polynomial_dreg.linear_polynomial_dreg, _linear_polynomial_dreg.check, _linear_polynomial_dreg_definition.linear_polynomial_dreg),
    "linear_activation_dreg": PublicOp(_linear_activation_dreg.linear_activation_dreg, _linear_activation_dreg.check, _linear_activation_dreg_definition.linear_activation_dreg),
}
"""Every public op by its name: the function, its argument check, its reference."""

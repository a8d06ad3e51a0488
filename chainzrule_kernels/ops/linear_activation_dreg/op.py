"""The public function and the registered operator.

On the CPU the matrix product is the library's, and behind it runs the operator of the pass over ``z``. On a GPU one
operator does both, in one kernel or in two as :func:`chainzrule_kernels.ops._launch.why_no_epilogue` decides.
"""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels import _checks, backends
from chainzrule_kernels.ops import _linear_operator
from chainzrule_kernels.ops._linear import linear_in_dtype_of_x
from chainzrule_kernels.ops.activation_dreg.op import operators as dreg_operators
from chainzrule_kernels.ops.linear_activation_dreg import definition
from chainzrule_kernels.ops.squared_weights.op import squared_row_norms


def linear_activation_dreg(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    r"""A linear layer with its activation, and the exact squared Frobenius norm of the layer's Jacobian.

    ``z = x Wᵀ + b``, ``y = f(z)``, and for each sample ``jac_sq = ‖diag(f'(z)) W‖_F² = Σ_j f'(z_j)² ‖W_j‖²``, without a
    product of matrices beyond the layer's own (SPEC 2.2; DREG, arXiv 2606.23942, ``variant="layer"``).

    Args:
        x: ``(..., in)``; float32, float64, bfloat16 or float16.
        weight: ``(out, in)``, as in :func:`torch.nn.functional.linear`; used in the dtype of ``x``, its row norms in
            float32 or better.
        bias: ``(out,)`` or None.
        kind: as in :func:`chainzrule_kernels.activation_dreg`.

    Returns:
        ``(y, jac_sq)``: ``y (..., out)`` in the dtype of ``z``, which is that of ``x``, or the autocast dtype under
        autocast; ``jac_sq`` of shape ``x.shape[:-1]`` in float32, float64 for float64 ``z``.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.

    Differentiable any number of times in every tensor argument, ``weight`` through the norm as well. Beside ``x`` and
    the parameters only ``z`` is saved for the backward, or on the CPU for relu ``y``.
    """
    check(x, weight, bias, kind)
    chosen = backends.choose("linear_activation_dreg", x)
    if chosen == "reference":
        return definition.linear_activation_dreg(x, weight, bias, kind)
    if chosen == "triton":
        row_sq = squared_row_norms(weight, x)
        keep_z = _linear_operator.keeps_z(x, weight, bias)
        y, jac_sq, _ = operator(*_linear_operator.operands(x, weight, bias), row_sq, kind, keep_z)
        return y, jac_sq
    z = linear_in_dtype_of_x(x, weight, bias)
    y, jac_sq, _ = dreg_operators.forward(z, squared_row_norms(weight, z), kind, False)
    return y, jac_sq


def check(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> None:
    """Raise for arguments that :func:`linear_activation_dreg` cannot take."""
    _checks.check_linear(x, weight, bias)
    _checks.check_kind(kind)


def how(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> str:
    """How the Triton kernels would run the call, for :func:`chainzrule_kernels.explain`."""
    return _linear_operator.how(x, weight, bias, None)


operator = _linear_operator.register_linear("linear_activation_dreg", has_coeffs=False, dreg=dreg_operators)

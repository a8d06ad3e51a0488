"""The public function and the registered operators."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels import _checks, backends
from chainzrule_kernels.ops import _tangent_calculus
from chainzrule_kernels.ops._operator_pairs import register_pair, tangent_fake
from chainzrule_kernels.ops.polynomial_tangent import definition


def polynomial_tangent(
    z: Tensor, z_dot: Tensor, coeffs: Tensor, *, rectified: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    r"""A polynomial and its tangent stream: the value, ``T`` tangents pushed through it, and their squared norms.

    ``y = p(z)``, ``ẏ_t = p'(z) ż_t`` and ``tangent_sq_t = Σ_j ẏ_tj²`` in one pass that reads ``z`` once for all ``T``
    (SPEC 2.3; the two-stream forward of ChainzRule, arXiv 2605.15463). With the unit vectors of the input as the first
    layer's tangents, ``Σ_t tangent_sq_t`` is the squared Frobenius norm of the accumulated Jacobian.

    Args:
        z: ``(..., N)``, any strides; float32, float64, bfloat16 or float16.
        z_dot: ``(T, ..., N)``, ``T`` tangents of ``z``, of the dtype of ``z``.
        coeffs: ``(D+1,)``, shared by the channels, or ``(D+1, N)``, one polynomial for each; ascending powers,
            ``1 <= D <= 8``.
        rectified: whether to apply the polynomial to ``relu(z)``: PolyReLU (PolyCom, arXiv 2411.03884). The derivatives
            are then 0 for ``z <= 0``, as those of PyTorch's relu.

    Returns:
        ``(y, y_dot, tangent_sq)``, contiguous: ``y`` like ``z``, ``y_dot`` like ``z_dot``, ``tangent_sq`` of shape
        ``z_dot.shape[:-1]`` in float32, float64 for float64 ``z``.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.
    """
    check(z, z_dot, coeffs, rectified=rectified)
    if backends.choose("polynomial_tangent", z) == "reference":
        return definition.polynomial_tangent(z, z_dot, coeffs, rectified=rectified)
    return operators.forward(z, z_dot, coeffs, rectified)


def check(z: Tensor, z_dot: Tensor, coeffs: Tensor, *, rectified: bool = False) -> None:
    """Raise for arguments that :func:`polynomial_tangent` cannot take."""
    _checks.check_z(z)
    _checks.check_z_dot(z_dot, z)
    _checks.check_coeffs(coeffs, z)
    _checks.check_flag("rectified", rectified)


def _operator_definition(z: Tensor, z_dot: Tensor, coeffs: Tensor, rectified: bool) -> tuple[Tensor, ...]:
    return definition.polynomial_tangent(z, z_dot, coeffs, rectified=rectified)


operators = register_pair(
    "polynomial_tangent",
    companion="Tensor z_dot",
    has_coeffs=True,
    flags="",
    grads=("grad_y", "grad_y_dot", "grad_tangent_sq"),
    definition=_operator_definition,
    fake=tangent_fake,
    calculus=_tangent_calculus,
)

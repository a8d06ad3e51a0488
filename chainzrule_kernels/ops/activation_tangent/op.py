"""The public function and the registered operators."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels import _checks, backends
from chainzrule_kernels.ops import _tangent_calculus
from chainzrule_kernels.ops._operator_pairs import register_pair, tangent_fake
from chainzrule_kernels.ops.activation_tangent import definition


def activation_tangent(z: Tensor, z_dot: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    r"""A fixed activation and its tangent stream: the value, ``T`` tangents pushed through it, and their squared norms.

    ``y = f(z)``, ``ẏ_t = f'(z) ż_t`` and ``tangent_sq_t = Σ_j ẏ_tj²`` in one pass that reads ``z`` once for all ``T``
    (SPEC 2.3). With the unit vectors of the input as the first layer's tangents, ``Σ_t tangent_sq_t`` is the squared
    Frobenius norm of the accumulated Jacobian.

    Args:
        z: ``(..., N)``, any strides; float32, float64, bfloat16 or float16.
        z_dot: ``(T, ..., N)``, ``T`` tangents of ``z``, of the dtype of ``z``.
        kind: as in :func:`chainzrule_kernels.activation_dreg`.

    Returns:
        ``(y, y_dot, tangent_sq)``, contiguous: ``y`` like ``z``, ``y_dot`` like ``z_dot``, ``tangent_sq`` of shape
        ``z_dot.shape[:-1]`` in float32, float64 for float64 ``z``.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.
    """
    check(z, z_dot, kind)
    if backends.choose("activation_tangent", z) == "reference":
        return definition.activation_tangent(z, z_dot, kind)
    return operators.forward(z, z_dot, kind)


def check(z: Tensor, z_dot: Tensor, kind: str) -> None:
    """Raise for arguments that :func:`activation_tangent` cannot take."""
    _checks.check_z(z)
    _checks.check_z_dot(z_dot, z)
    _checks.check_kind(kind)


operators = register_pair(
    "activation_tangent",
    companion="Tensor z_dot",
    has_coeffs=False,
    flags="",
    grads=("grad_y", "grad_y_dot", "grad_tangent_sq"),
    definition=definition.activation_tangent,
    fake=tangent_fake,
    calculus=_tangent_calculus,
)

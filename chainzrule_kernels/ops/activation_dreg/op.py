"""The public function and the registered operators."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from chainzrule_kernels import _checks, backends
from chainzrule_kernels.ops import _dreg_calculus
from chainzrule_kernels.ops._operator_pairs import dreg_fake, register_pair
from chainzrule_kernels.ops.activation_dreg import definition


@overload
def activation_dreg(
    z: Tensor, kind: str, row_sq: Tensor | None = None, *, return_derivative: Literal[False] = False
) -> tuple[Tensor, Tensor]: ...
@overload
def activation_dreg(
    z: Tensor, kind: str, row_sq: Tensor | None = None, *, return_derivative: Literal[True]
) -> tuple[Tensor, Tensor, Tensor]: ...
def activation_dreg(
    z: Tensor, kind: str, row_sq: Tensor | None = None, *, return_derivative: bool = False
) -> tuple[Tensor, ...]:
    r"""A fixed activation, its derivative and the layer Jacobian norm in one pass over ``z``.

    ``y = f(z)`` and for each sample ``jac_sq = Σ_j f'(z_j)² row_sq_j``. For the layer ``y = f(W x + b)`` with
    ``row_sq_j = ‖W_j‖²`` that is the squared Frobenius norm of the Jacobian of ``y`` with respect to ``x``, exactly
    (SPEC 2.2; DREG, arXiv 2606.23942).

    Args:
        z: ``(..., N)``, any strides; float32, float64, bfloat16 or float16.
        kind: ``"relu"``, ``"gelu"`` (the exact one, with erf), ``"gelu_tanh"``, ``"silu"``, ``"tanh"``, ``"sigmoid"``,
            ``"softplus"`` or ``"mish"``. The derivative of relu at 0 is 0, as in PyTorch.
        row_sq: ``(N,)``, the weight of each channel in the norm; None for 1 (the ``"activation"`` variant of DREG).
        return_derivative: whether to return ``f'(z)`` too.

    Returns:
        ``(y, jac_sq)`` or ``(y, jac_sq, derivative)``, contiguous. ``y`` and ``derivative`` have the shape and dtype of
        ``z``; ``jac_sq`` has shape ``z.shape[:-1]`` and dtype float32, float64 for float64 ``z``.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.

    Arithmetic is in float32 (float64 for float64 ``z``). Differentiable any number of times in ``z`` and ``row_sq``;
    only ``z`` is saved for the backward, and of relu only ``y``, where its derivatives are the same.
    """
    check(z, kind, row_sq, return_derivative=return_derivative)
    if backends.choose("activation_dreg", z) == "reference":
        return definition.activation_dreg(z, kind, row_sq, return_derivative=return_derivative)
    y, jac_sq, derivative = operators.forward(z, row_sq, kind, return_derivative)
    return (y, jac_sq, derivative) if return_derivative else (y, jac_sq)


def check(z: Tensor, kind: str, row_sq: Tensor | None = None, *, return_derivative: bool = False) -> None:
    """Raise for arguments that :func:`activation_dreg` cannot take."""
    _checks.check_z(z)
    _checks.check_kind(kind)
    _checks.check_row_sq(row_sq, z)
    _checks.check_flag("return_derivative", return_derivative)


def _operator_definition(z: Tensor, row_sq: Tensor | None, kind: str, return_derivative: bool) -> tuple[Tensor, ...]:
    results = definition.activation_dreg(z, kind, row_sq, return_derivative=return_derivative)
    return results if return_derivative else (*results, z.new_empty(0))


operators = register_pair(
    "activation_dreg",
    companion="Tensor? row_sq",
    has_coeffs=False,
    flags="bool return_derivative",
    grads=("grad_y", "grad_jac_sq", "grad_derivative"),
    definition=_operator_definition,
    fake=dreg_fake,
    calculus=_dreg_calculus,
)

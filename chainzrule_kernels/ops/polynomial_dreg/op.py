"""The public function and the registered operators."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from chainzrule_kernels import _checks, backends
from chainzrule_kernels.ops import _dreg_calculus
from chainzrule_kernels.ops._operator_pairs import dreg_fake, register_pair
from chainzrule_kernels.ops.polynomial_dreg import definition


@overload
def polynomial_dreg(
    z: Tensor,
    coeffs: Tensor,
    row_sq: Tensor | None = None,
    *,
    return_derivative: Literal[False] = False,
    rectified: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def polynomial_dreg(
    z: Tensor,
    coeffs: Tensor,
    row_sq: Tensor | None = None,
    *,
    return_derivative: Literal[True],
    rectified: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...
def polynomial_dreg(
    z: Tensor, coeffs: Tensor, row_sq: Tensor | None = None, *, return_derivative: bool = False, rectified: bool = False
) -> tuple[Tensor, ...]:
    r"""A polynomial, its derivative and the layer Jacobian norm in one pass over ``z``.

    ``y = p(z)`` with ``p(z) = c0 + c1 z + … + cD z^D``, and for each sample ``jac_sq = Σ_j p'(z_j)² row_sq_j``. For the
    layer ``y = p(W x + b)`` with ``row_sq_j = ‖W_j‖²`` that is the squared Frobenius norm of the Jacobian of ``y`` with
    respect to ``x``, exactly (SPEC 2.2; ChainzRule, arXiv 2605.15463; DREG, arXiv 2606.23942).

    Args:
        z: ``(..., N)``, any strides; float32, float64, bfloat16 or float16.
        coeffs: ``(D+1,)``, shared by the channels, or ``(D+1, N)``, one polynomial for each; ascending powers,
            ``1 <= D <= 8``.
        row_sq: ``(N,)``, the weight of each channel in the norm; None for 1 (the ``"activation"`` variant of DREG).
        return_derivative: whether to return ``p'(z)`` too.
        rectified: whether to apply the polynomial to ``relu(z)``: PolyReLU (PolyCom, arXiv 2411.03884). The derivatives
            are then 0 for ``z <= 0``, as those of PyTorch's relu.

    Returns:
        ``(y, jac_sq)`` or ``(y, jac_sq, derivative)``, contiguous. ``y`` and ``derivative`` have the shape and dtype of
        ``z``; ``jac_sq`` has shape ``z.shape[:-1]`` and dtype float32, float64 for float64 ``z``.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.

    Coefficients and ``row_sq`` may have another dtype than ``z``; arithmetic is in float32 (float64 for float64 ``z``).
    Differentiable any number of times in ``z``, ``coeffs`` and ``row_sq``; only ``z`` is saved for the backward.
    """
    check(z, coeffs, row_sq, return_derivative=return_derivative, rectified=rectified)
    if backends.choose("polynomial_dreg", z) == "reference":
        return definition.polynomial_dreg(z, coeffs, row_sq, return_derivative=return_derivative, rectified=rectified)
    y, jac_sq, derivative = operators.forward(z, row_sq, coeffs, rectified, return_derivative)
    return (y, jac_sq, derivative) if return_derivative else (y, jac_sq)


def check(
    z: Tensor,
    coeffs: Tensor,
    row_sq: Tensor | None = None,
    *,
    return_derivative: bool = False,
    rectified: bool = False,
) -> None:
    """Raise for arguments that :func:`polynomial_dreg` cannot take."""
    _checks.check_z(z)
    _checks.check_coeffs(coeffs, z)
    _checks.check_row_sq(row_sq, z)
    _checks.check_flag("return_derivative", return_derivative)
    _checks.check_flag("rectified", rectified)


def _operator_definition(
    z: Tensor, row_sq: Tensor | None, coeffs: Tensor, rectified: bool, return_derivative: bool
) -> tuple[Tensor, ...]:
    results = definition.polynomial_dreg(z, coeffs, row_sq, return_derivative=return_derivative, rectified=rectified)
    return results if return_derivative else (*results, z.new_empty(0))


operators = register_pair(
    "polynomial_dreg",
    companion="Tensor? row_sq",
    has_coeffs=True,
    flags="bool return_derivative",
    grads=("grad_y", "grad_jac_sq", "grad_derivative"),
    definition=_operator_definition,
    fake=dreg_fake,
    calculus=_dreg_calculus,
)

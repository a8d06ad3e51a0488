"""The public function and the registered operators."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels import _checks, backends
from chainzrule_kernels.ops import _spatial_calculus
from chainzrule_kernels.ops._feature_maps import like_the_input
from chainzrule_kernels.ops._operator_pairs import register_pair, spatial_dreg_fake
from chainzrule_kernels.ops.polynomial_spatial_dreg import definition


def polynomial_spatial_dreg(
    z: Tensor, coeffs: Tensor, tap_sq: Tensor | None = None, *, rectified: bool = False
) -> tuple[Tensor, Tensor]:
    r"""A polynomial of feature maps and the layer Jacobian norm of each image, in one pass over ``z``.

    ``y = p(z)`` and ``jac_sq_b = Σ_{c,h,w} p'(z_{b,c,h,w})² tap_sq_{c,h,w}``. For the layer ``y = p(conv(x, W) + b)``,
    with ``tap_sq`` the sum of ``W_c²`` over the taps that fall inside the image at ``(h, w)``, that is the squared
    Frobenius norm of the Jacobian of ``y`` with respect to ``x``, exactly, borders included (SPEC 2.4; DREG, arXiv
    2606.23942).

    Args:
        z: ``(B, C, *spatial)`` with any number of spatial sizes, any strides; float32, float64, bfloat16 or float16.
        coeffs: ``(D+1,)``, shared by the channels, or ``(D+1, C)``, one polynomial for each; ascending powers,
            ``1 <= D <= 8``.
        tap_sq: the weight of each element in the norm: ``(C, *spatial)``, ``(C,)`` where it is the same at every
            position (a convolution without padding), or None for 1 (the ``"activation"`` variant of DREG).
        rectified: whether to apply the polynomial to ``relu(z)``: PolyReLU (PolyCom, arXiv 2411.03884). The derivatives
            are then 0 for ``z <= 0``, as those of PyTorch's relu.

    Returns:
        ``(y, jac_sq)``. ``y`` has the shape and dtype of ``z``, and its channels innermost in memory if ``z`` has
        (``torch.channels_last``), else it is contiguous. ``jac_sq`` has shape ``(B,)`` and dtype float32, float64 for
        float64 ``z``.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.

    Coefficients and ``tap_sq`` may have another dtype than ``z``; arithmetic is in float32 (float64 for float64 ``z``).
    Differentiable any number of times in ``z``, ``coeffs`` and ``tap_sq``; only ``z`` is saved for the backward.
    """
    check(z, coeffs, tap_sq, rectified=rectified)
    if backends.choose("polynomial_spatial_dreg", z) == "reference":
        return definition.polynomial_spatial_dreg(z, coeffs, tap_sq, rectified=rectified)
    y, jac_sq = operators.forward(z, tap_sq, coeffs, rectified)
    return y, jac_sq


def check(z: Tensor, coeffs: Tensor, tap_sq: Tensor | None = None, *, rectified: bool = False) -> None:
    """Raise for arguments that :func:`polynomial_spatial_dreg` cannot take."""
    _checks.check_feature_maps(z)
    _checks.check_coeffs(coeffs, z, channels=z.shape[1])
    _checks.check_tap_sq(tap_sq, z)
    _checks.check_flag("rectified", rectified)


def _operator_definition(z: Tensor, tap_sq: Tensor | None, coeffs: Tensor, rectified: bool) -> tuple[Tensor, ...]:
    return definition.polynomial_spatial_dreg(z, coeffs, tap_sq, rectified=rectified)


operators = register_pair(
    "polynomial_spatial_dreg",
    companion="Tensor? tap_sq",
    has_coeffs=True,
    flags="",
    grads=("grad_y", "grad_jac_sq"),
    definition=_operator_definition,
    fake=spatial_dreg_fake,
    calculus=_spatial_calculus,
    arrange=like_the_input,
)

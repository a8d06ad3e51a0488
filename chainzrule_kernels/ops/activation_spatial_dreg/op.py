"""The public function and the registered operators."""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels import _checks, backends
from chainzrule_kernels.ops import _spatial_calculus
from chainzrule_kernels.ops._feature_maps import like_the_input
from chainzrule_kernels.ops._operator_pairs import register_pair, spatial_dreg_fake
from chainzrule_kernels.ops.activation_spatial_dreg import definition


def activation_spatial_dreg(z: Tensor, kind: str, tap_sq: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""A fixed activation of feature maps and the layer Jacobian norm of each image, in one pass over ``z``.

    ``y = f(z)`` and ``jac_sq_b = Σ_{c,h,w} f'(z_{b,c,h,w})² tap_sq_{c,h,w}``. For the layer ``y = f(conv(x, W) + b)``,
    with ``tap_sq`` the sum of ``W_c²`` over the taps that fall inside the image at ``(h, w)``, that is the squared
    Frobenius norm of the Jacobian of ``y`` with respect to ``x``, exactly, borders included (SPEC 2.4; DREG, arXiv
    2606.23942).

    Args:
        z: ``(B, C, *spatial)`` with any number of spatial sizes, any strides; float32, float64, bfloat16 or float16.
        kind: ``"relu"``, ``"gelu"`` (the exact one, with erf), ``"gelu_tanh"``, ``"silu"``, ``"tanh"``, ``"sigmoid"``,
            ``"softplus"`` or ``"mish"``. The derivative of relu at 0 is 0, as in PyTorch.
        tap_sq: the weight of each element in the norm: ``(C, *spatial)``, ``(C,)`` where it is the same at every
            position (a convolution without padding), or None for 1 (the ``"activation"`` variant of DREG).

    Returns:
        ``(y, jac_sq)``. ``y`` has the shape and dtype of ``z``, and its channels innermost in memory if ``z`` has
        (``torch.channels_last``), else it is contiguous. ``jac_sq`` has shape ``(B,)`` and dtype float32, float64 for
        float64 ``z``.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, shape or device, before anything is computed.

    Arithmetic is in float32 (float64 for float64 ``z``). Differentiable any number of times in ``z`` and ``tap_sq``;
    only ``z`` is saved for the backward, and of relu only ``y``, where its derivatives are the same.
    """
    check(z, kind, tap_sq)
    if backends.choose("activation_spatial_dreg", z) == "reference":
        return definition.activation_spatial_dreg(z, kind, tap_sq)
    y, jac_sq = operators.forward(z, tap_sq, kind)
    return y, jac_sq


def check(z: Tensor, kind: str, tap_sq: Tensor | None = None) -> None:
    """Raise for arguments that :func:`activation_spatial_dreg` cannot take."""
    _checks.check_feature_maps(z)
    _checks.check_kind(kind)
    _checks.check_tap_sq(tap_sq, z)


def _operator_definition(z: Tensor, tap_sq: Tensor | None, kind: str) -> tuple[Tensor, ...]:
    return definition.activation_spatial_dreg(z, kind, tap_sq)


operators = register_pair(
    "activation_spatial_dreg",
    companion="Tensor? tap_sq",
    has_coeffs=False,
    flags="",
    grads=("grad_y", "grad_jac_sq"),
    definition=_operator_definition,
    fake=spatial_dreg_fake,
    calculus=_spatial_calculus,
    arrange=like_the_input,
)

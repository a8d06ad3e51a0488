r"""An activation of the maps that a convolution made, and the layer's Jacobian norm, in plain PyTorch (SPEC 2.4).

``y = f(z)`` and ``jac_sq_b = Σ_{c,h,w} f'(z_{b,c,h,w})² r_c g_{c,h,w}`` for ``z = conv(x, W) + bias``, with ``g`` the
sums of ``W²`` over the taps that fall inside the image (:mod:`~chainzrule_kernels.ops.squared_weights.definition`) and
``r`` what a batch norm between the two multiplies the square of each channel's row of the Jacobian with.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from chainzrule_kernels.ops.activation_spatial_dreg.definition import activation_spatial_dreg
from chainzrule_kernels.ops.squared_weights.op import operators as squares


def convolved_activation_dreg(
    z: Tensor, weight: Tensor, factor: Tensor | None, *numbers_and_kind: Sequence[int] | str
) -> tuple[Tensor, Tensor]:
    """``(y, jac_sq)``.

    Args:
        z: ``(B, K, *out)``, the result of the convolution.
        weight: ``(K, C / groups, *window)``.
        factor: ``r (K,)``; None for 1.
        *numbers_and_kind: the windows, as :func:`chainzrule_kernels.ops.squared_weights.op.numbers` writes them down,
            and the activation.

    Returns:
        ``y`` like ``z``, and ``jac_sq (B,)`` in the dtype in which an op on ``z`` computes.
    """
    *numbers, kind = numbers_and_kind
    assert isinstance(kind, str)
    return activation_spatial_dreg(z, kind, weighted(squares.forward.definition(weight, *numbers), factor))


def weighted(sums: Tensor, factor: Tensor | None) -> Tensor:
    """``r_c g_{c,h,w}``, in the dtype of ``g (K, *out)`` or ``(K,)``."""
    return sums if factor is None else sums * factor.to(sums.dtype).view(-1, *(1,) * (sums.dim() - 1))

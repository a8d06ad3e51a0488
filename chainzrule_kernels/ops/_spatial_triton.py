"""``polynomial_spatial_dreg`` and ``activation_spatial_dreg`` on the Triton kernels: from feature maps to matrices.

An image is one row of a matrix, in whatever order its elements lie in memory: then ``tap_sq`` in the same order is the
``row_sq`` of the pass over matrices, and coefficients for each channel are coefficients for each element. So a program
reads the ``tap_sq`` of its elements once for all images, every row has a norm of its own, and 16-byte accesses need
only images, not channels or positions, that are a whole number of vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.ops import _dreg_triton
from chainzrule_kernels.ops._call_triton import nothing, polynomial_kind
from chainzrule_kernels.ops._feature_maps import channels_innermost


class _Images:
    """Feature maps ``(B, C, *spatial)`` as a matrix with one row for each image, and back."""

    def __init__(self, z: Tensor) -> None:
        self.shape = z.shape
        self.innermost = channels_innermost(z)

    def matrix(self, maps: Tensor) -> Tensor:
        """``(B, C, *spatial)``, in any layout, as ``(B, elements)`` in the order of ``z``; copied only if need be."""
        return self._ordered(maps, 1).flatten(1)

    def each(self, values: Tensor, first: int) -> Tensor:
        """A parameter ``(…, C)`` or ``(…, C, *spatial)``, channels in dimension ``first``, for each element."""
        spatial = self.shape[2:]
        if values.dim() == first + 1:
            values = values.reshape(*values.shape, *(1 for _ in spatial)).expand(*values.shape, *spatial)
        return self._ordered(values, first).flatten(first)

    def maps(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        return self._unordered(matrix, 1)

    def of_parameter(self, gradient: Tensor, parameter: Tensor, first: int) -> Tensor:
        """The inverse of :meth:`each` for a gradient: summed over the positions that share an element."""
        gradient = self._unordered(gradient, first)
        if parameter.dim() < gradient.dim():
            gradient = gradient.flatten(first + 1).sum(-1, dtype=torch.float64)
        return gradient.contiguous().to(parameter.dtype)

    def _ordered(self, values: Tensor, first: int) -> Tensor:
        return (values.movedim(first, -1) if self.innermost else values).contiguous()

    def _unordered(self, values: Tensor, first: int) -> Tensor:
        channels, *spatial = self.shape[1:]
        if self.innermost:
            return values.view(*values.shape[:first], *spatial, channels).movedim(-1, first)
        return values.view(*values.shape[:first], channels, *spatial)


def _parameters(
    images: _Images, z: Tensor, tap_sq: Tensor | None, coeffs: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``tap_sq`` for each element, and the coefficients: as they are where the channels share them."""
    dtype = compute_dtype(z)
    row_sq = None if tap_sq is None else images.each(tap_sq.to(dtype), 0)
    if coeffs is not None and coeffs.dim() == 2:
        coeffs = images.each(coeffs.to(dtype), 1)
    return row_sq, coeffs


def _forward(z: Tensor, tap_sq: Tensor | None, coeffs: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    images = _Images(z)
    y, jac_sq, _ = _dreg_triton.dreg(images.matrix(z), *_parameters(images, z, tap_sq, coeffs), kind, False)
    return images.maps(y), jac_sq


def _backward(
    z: Tensor,
    tap_sq: Tensor | None,
    coeffs: Tensor | None,
    kind: str,
    grads: tuple[Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``(z, tap_sq, coeffs)``, empty where they are not wanted."""
    images = _Images(z)
    grad_y = None if grads[0] is None else images.matrix(grads[0])
    row_sq, element_coeffs = _parameters(images, z, tap_sq, coeffs)
    dz, drow_sq, dcoeffs = _dreg_triton.backward(
        images.matrix(z), row_sq, element_coeffs, kind, (grad_y, grads[1], None), needs
    )
    if needs[0]:
        dz = images.maps(dz)
    dtap_sq = nothing(z)
    if needs[1] and tap_sq is not None:
        dtap_sq = images.of_parameter(drow_sq, tap_sq, 0)
    if needs[2] and coeffs is not None and coeffs.dim() == 2:
        dcoeffs = images.of_parameter(dcoeffs, coeffs, 1)
    return dz, dtap_sq, dcoeffs


def polynomial_spatial_dreg(z: Tensor, tap_sq: Tensor | None, coeffs: Tensor, rectified: bool) -> tuple[Tensor, Tensor]:
    """The operator ``polynomial_spatial_dreg``."""
    return _forward(z, tap_sq, coeffs, polynomial_kind(rectified))


def polynomial_spatial_dreg_backward(
    z: Tensor,
    tap_sq: Tensor | None,
    coeffs: Tensor,
    grad_y: Tensor | None,
    grad_jac_sq: Tensor | None,
    rectified: bool,
    needs_z: bool,
    needs_tap_sq: bool,
    needs_coeffs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``polynomial_spatial_dreg_backward``."""
    needs = (needs_z, needs_tap_sq, needs_coeffs)
    return _backward(z, tap_sq, coeffs, polynomial_kind(rectified), (grad_y, grad_jac_sq), needs)


def activation_spatial_dreg(z: Tensor, tap_sq: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """The operator ``activation_spatial_dreg``."""
    return _forward(z, tap_sq, None, kind)


def activation_spatial_dreg_backward(
    z: Tensor,
    tap_sq: Tensor | None,
    grad_y: Tensor | None,
    grad_jac_sq: Tensor | None,
    kind: str,
    needs_z: bool,
    needs_tap_sq: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``activation_spatial_dreg_backward``."""
    dz, dtap_sq, _ = _backward(z, tap_sq, None, kind, (grad_y, grad_jac_sq), (needs_z, needs_tap_sq, False))
    return dz, dtap_sq

"""``polynomial_tangent`` and ``activation_tangent`` on the Triton kernels: from tensors to launches."""

from __future__ import annotations

import torch
from torch import Tensor

from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.ops import _launch
from chainzrule_kernels.ops._call_triton import (
    added_up,
    contiguous,
    empty_like,
    launch,
    nothing,
    per_sample,
    polynomial_kind,
    rows_and_columns,
)
from chainzrule_kernels.ops._tangent_kernels_triton import (
    tangent_backward_kernel,
    tangent_forward_kernel,
)


def _forward(z: Tensor, z_dot: Tensor, coeffs: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    y, y_dot = empty_like(z), empty_like(z_dot)
    norm = z.new_empty(z_dot.shape[:-1], dtype=compute_dtype(z))
    if z.numel() == 0:
        return y, y_dot, norm.zero_()
    z, z_dot, coeffs = contiguous(z), contiguous(z_dot), contiguous(coeffs)
    rows, columns = rows_and_columns(z)
    itemsize = z.element_size()
    plan = _launch.tangent_plan(rows, columns, itemsize)
    parts = norm if plan.splits == 1 else norm.new_empty(norm.numel(), plan.splits)
    launch(
        tangent_forward_kernel,
        plan,
        _launch.tangent_tiles(itemsize),
        (z, z_dot, coeffs, y, y_dot, parts),
        (z_dot.shape[0], rows, columns, plan.splits),
        {
            "KIND": kind,
            "DEGREE": 0 if coeffs is None else coeffs.shape[0] - 1,
            "PER_CHANNEL": coeffs is not None and coeffs.dim() == 2,
        },
    )
    if parts is not norm:
        torch.sum(parts, -1, out=norm.view(-1))
    return y, y_dot, norm


def _backward(
    z: Tensor,
    z_dot: Tensor,
    coeffs: Tensor | None,
    kind: str,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``(z, z_dot, coeffs)``, empty where they are not wanted."""
    needs_z, needs_z_dot, needs_coeffs = needs
    grad_y, grad_y_dot, grad_norm = grads if z_dot.shape[0] > 0 else (grads[0], None, None)
    dz = empty_like(z) if needs_z else nothing(z)
    dz_dot = empty_like(z_dot) if needs_z_dot else nothing(z)
    of_slope = grad_y_dot is not None or grad_norm is not None
    if z.numel() == 0 or (grad_y is None and not of_slope):
        return dz.zero_(), dz_dot.zero_(), added_up(None, coeffs) if needs_coeffs else nothing(z)
    if not of_slope:
        dz_dot.zero_()
    coeffs_parameter = coeffs
    z, z_dot, coeffs = contiguous(z), contiguous(z_dot), contiguous(coeffs)
    grad_y, grad_y_dot = contiguous(grad_y), contiguous(grad_y_dot)
    grad_norm, grad_norm_stride = per_sample(grad_norm)
    rows, columns = rows_and_columns(z)
    itemsize = z.element_size()
    degree = 0 if coeffs is None else coeffs.shape[0] - 1
    per_channel = coeffs is not None and coeffs.dim() == 2
    if per_channel:
        plan = _launch.channel_plan(rows, columns, itemsize, _launch.channel_degree(kind, degree))
        tiles = _launch.channel_tiles(itemsize, _launch.channel_degree(kind, degree))
    else:
        plan = _launch.tangent_backward_plan(rows, columns, itemsize, needs_coeffs)
        tiles = _launch.tangent_backward_tiles(itemsize)
    coefficient_sums = None
    if needs_coeffs:
        shape = (plan.row_programs, degree + 1, columns) if per_channel else (plan.programs, degree + 1)
        coefficient_sums = z.new_empty(shape, dtype=compute_dtype(z))
    launch(
        tangent_backward_kernel,
        plan,
        tiles,
        (
            z,
            z_dot,
            coeffs,
            grad_y,
            grad_y_dot,
            grad_norm,
            dz if needs_z else None,
            dz_dot if needs_z_dot else None,
            coefficient_sums,
        ),
        (
            grad_norm_stride,
            z_dot.shape[0],
            rows,
            columns,
            plan.steps_per_split,
            plan.splits,
            plan.blocks_per_program,
        ),
        {"KIND": kind, "DEGREE": degree, "PER_CHANNEL": per_channel},
    )
    return dz, dz_dot, added_up(coefficient_sums, coeffs_parameter) if needs_coeffs else nothing(z)


def polynomial_tangent(z: Tensor, z_dot: Tensor, coeffs: Tensor, rectified: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``polynomial_tangent``."""
    return _forward(z, z_dot, coeffs, polynomial_kind(rectified))


def polynomial_tangent_backward(
    z: Tensor,
    z_dot: Tensor,
    coeffs: Tensor,
    grad_y: Tensor | None,
    grad_y_dot: Tensor | None,
    grad_tangent_sq: Tensor | None,
    rectified: bool,
    needs_z: bool,
    needs_z_dot: bool,
    needs_coeffs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``polynomial_tangent_backward``."""
    grads = (grad_y, grad_y_dot, grad_tangent_sq)
    return _backward(z, z_dot, coeffs, polynomial_kind(rectified), grads, (needs_z, needs_z_dot, needs_coeffs))


def activation_tangent(z: Tensor, z_dot: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``activation_tangent``."""
    return _forward(z, z_dot, None, kind)


def activation_tangent_backward(
    z: Tensor,
    z_dot: Tensor,
    grad_y: Tensor | None,
    grad_y_dot: Tensor | None,
    grad_tangent_sq: Tensor | None,
    kind: str,
    needs_z: bool,
    needs_z_dot: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``activation_tangent_backward``."""
    dz, dz_dot, _ = _backward(
        z, z_dot, None, kind, (grad_y, grad_y_dot, grad_tangent_sq), (needs_z, needs_z_dot, False)
    )
    return dz, dz_dot

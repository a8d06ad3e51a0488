"""``polynomial``, ``polynomial_dreg`` and ``activation_dreg`` on the Triton kernels: from tensors to launches."""

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
from chainzrule_kernels.ops._dreg_kernels_triton import (
    dreg_backward_kernel,
    dreg_channel_backward_kernel,
    dreg_channel_forward_kernel,
    dreg_forward_kernel,
)


def _forward(
    z: Tensor,
    row_sq: Tensor | None,
    coeffs: Tensor | None,
    kind: str,
    norm: Tensor | None,
    return_derivative: bool,
) -> tuple[Tensor, Tensor]:
    """``(y, derivative)``; ``norm`` is filled where it is given."""
    y = empty_like(z)
    derivative = empty_like(z) if return_derivative else None
    y_and_derivative = y, nothing(z) if derivative is None else derivative
    if z.numel() == 0:
        if norm is not None:
            norm.zero_()
        return y_and_derivative
    z, row_sq, coeffs = contiguous(z), contiguous(row_sq), contiguous(coeffs)
    rows, columns = rows_and_columns(z)
    itemsize = z.element_size()
    degree = 0 if coeffs is None else coeffs.shape[0] - 1
    per_channel = coeffs is not None and coeffs.dim() == 2
    channel_parameters = per_channel or row_sq is not None
    if channel_parameters:
        plan = _launch.channel_plan(rows, columns, itemsize, _launch.channel_degree(kind, degree))
        tiles = _launch.channel_tiles(itemsize, _launch.channel_degree(kind, degree))
    elif norm is None:
        rows, columns = 1, z.numel()
        plan, tiles = _launch.flat_plan(columns, itemsize), _launch.flat_tiles(itemsize)
    else:
        activation = coeffs is None
        plan = _launch.forward_plan(rows, columns, itemsize, activation)
        tiles = _launch.forward_tiles(itemsize, activation)
    parts = norm
    if norm is not None and plan.splits > 1:
        parts = norm.new_empty(rows, plan.splits)
    if channel_parameters:
        launch(
            dreg_channel_forward_kernel,
            plan,
            tiles,
            (z, coeffs, row_sq, y, derivative, parts),
            (rows, columns, plan.splits, plan.blocks_per_program),
            {"KIND": kind, "DEGREE": degree, "PER_CHANNEL": per_channel},
        )
    else:
        launch(
            dreg_forward_kernel,
            plan,
            tiles,
            (z, coeffs, y, derivative, parts),
            (rows, columns, plan.steps_per_split, plan.splits),
            {"KIND": kind, "DEGREE": degree},
        )
    if norm is not None and parts is not None and parts is not norm:
        torch.sum(parts, -1, out=norm.view(-1))
    return y_and_derivative


def backward(
    z: Tensor,
    row_sq: Tensor | None,
    coeffs: Tensor | None,
    kind: str,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``(z, row_sq, coeffs)``, empty where they are not wanted."""
    needs_z, needs_row_sq, needs_coeffs = needs
    grad_y, grad_norm, grad_derivative = grads
    needs_row_sq_sums = needs_row_sq and grad_norm is not None
    dz = empty_like(z) if needs_z else nothing(z)
    if z.numel() == 0 or (grad_y is None and grad_norm is None and grad_derivative is None):
        return (
            dz.zero_(),
            added_up(None, row_sq) if needs_row_sq else nothing(z),
            added_up(None, coeffs) if needs_coeffs else nothing(z),
        )
    row_sq_parameter, coeffs_parameter = row_sq, coeffs
    z, row_sq, coeffs = contiguous(z), contiguous(row_sq), contiguous(coeffs)
    grad_y, grad_derivative = contiguous(grad_y), contiguous(grad_derivative)
    grad_norm, grad_norm_stride = per_sample(grad_norm)
    rows, columns = rows_and_columns(z)
    itemsize = z.element_size()
    degree = 0 if coeffs is None else coeffs.shape[0] - 1
    per_channel = coeffs is not None and coeffs.dim() == 2
    # Without a norm row_sq does not enter.
    row_sq = None if grad_norm is None else row_sq
    channel_parameters = per_channel or row_sq is not None
    if channel_parameters:
        plan = _launch.channel_plan(rows, columns, itemsize, _launch.channel_degree(kind, degree))
        tiles = _launch.channel_tiles(itemsize, _launch.channel_degree(kind, degree))
    elif grad_norm is None:
        rows, columns = 1, z.numel()
        plan = _launch.flat_backward_plan(columns, itemsize, needs_coeffs)
        tiles = _launch.flat_backward_tiles(itemsize)
    else:
        plan = _launch.backward_plan(rows, columns, itemsize, needs_coeffs)
        tiles = _launch.backward_tiles(itemsize)
    dtype = compute_dtype(z)
    coefficient_sums = row_sq_sums = None
    if needs_coeffs and per_channel:
        coefficient_sums = z.new_empty((plan.row_programs, degree + 1, columns), dtype=dtype)
    elif needs_coeffs:
        coefficient_sums = z.new_empty((plan.programs, degree + 1), dtype=dtype)
    if needs_row_sq_sums:
        row_sq_sums = z.new_empty((plan.row_programs, columns), dtype=dtype)
    grad_z = dz if needs_z else None
    if channel_parameters:
        launch(
            dreg_channel_backward_kernel,
            plan,
            tiles,
            (z, coeffs, row_sq, grad_y, grad_norm, grad_derivative, grad_z, coefficient_sums, row_sq_sums),
            (grad_norm_stride, rows, columns, plan.splits, plan.blocks_per_program),
            {"KIND": kind, "DEGREE": degree, "PER_CHANNEL": per_channel},
        )
    else:
        launch(
            dreg_backward_kernel,
            plan,
            tiles,
            (z, coeffs, grad_y, grad_norm, grad_derivative, grad_z, coefficient_sums),
            (grad_norm_stride, rows, columns, plan.steps_per_split, plan.splits, plan.blocks_per_program),
            {"KIND": kind, "DEGREE": degree},
        )
    return (
        dz,
        added_up(row_sq_sums, row_sq_parameter) if needs_row_sq else nothing(z),
        added_up(coefficient_sums, coeffs_parameter) if needs_coeffs else nothing(z),
    )


def dreg(
    z: Tensor, row_sq: Tensor | None, coeffs: Tensor | None, kind: str, return_derivative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, jac_sq, derivative)``, the last one empty unless it is asked for."""
    norm = z.new_empty(z.shape[:-1], dtype=compute_dtype(z))
    y, derivative = _forward(z, row_sq, coeffs, kind, norm, return_derivative)
    return y, norm, derivative


def polynomial(z: Tensor, coeffs: Tensor, rectified: bool) -> Tensor:
    """The operator ``polynomial``."""
    return _forward(z, None, coeffs, polynomial_kind(rectified), None, False)[0]


def polynomial_dreg(
    z: Tensor, row_sq: Tensor | None, coeffs: Tensor, rectified: bool, return_derivative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``polynomial_dreg``."""
    return dreg(z, row_sq, coeffs, polynomial_kind(rectified), return_derivative)


def polynomial_dreg_backward(
    z: Tensor,
    row_sq: Tensor | None,
    coeffs: Tensor,
    grad_y: Tensor | None,
    grad_jac_sq: Tensor | None,
    grad_derivative: Tensor | None,
    rectified: bool,
    needs_z: bool,
    needs_row_sq: bool,
    needs_coeffs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``polynomial_dreg_backward``."""
    grads = (grad_y, grad_jac_sq, grad_derivative)
    return backward(z, row_sq, coeffs, polynomial_kind(rectified), grads, (needs_z, needs_row_sq, needs_coeffs))


def activation_dreg(
    z: Tensor, row_sq: Tensor | None, kind: str, return_derivative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``activation_dreg``."""
    return dreg(z, row_sq, None, kind, return_derivative)


def activation_dreg_backward(
    z: Tensor,
    row_sq: Tensor | None,
    grad_y: Tensor | None,
    grad_jac_sq: Tensor | None,
    grad_derivative: Tensor | None,
    kind: str,
    needs_z: bool,
    needs_row_sq: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``activation_dreg_backward``."""
    grads = (grad_y, grad_jac_sq, grad_derivative)
    dz, drow_sq, _ = backward(z, row_sq, None, kind, grads, (needs_z, needs_row_sq, False))
    return dz, drow_sq

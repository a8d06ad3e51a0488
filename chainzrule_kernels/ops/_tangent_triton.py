r"""The Triton kernels of ``polynomial_tangent`` and ``activation_tangent``, and the operators on them (SPEC 2.3).

The forward reads ``z`` once for all tangents, the backward too; every tangent is read once and written once. Tiles and
programs: :mod:`chainzrule_kernels.ops._launch`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.functions.triton_functions import function
from chainzrule_kernels.ops import _launch
from chainzrule_kernels.ops._call_triton import (
    added_up,
    contiguous,
    empty_like,
    launch,
    nothing,
    per_sample,
    rows_and_columns,
)
from chainzrule_kernels.ops._tiles_triton import (
    add_coefficient_gradients,
    load_coefficients,
    no_sums,
    put_coefficient_sums,
    tile_at,
)


@triton.jit(do_not_specialize=["tangents", "rows", "columns", "splits"])
def tangent_forward_kernel(
    z_pointer,
    z_dot_pointer,
    coeffs_pointer,
    y_pointer,
    y_dot_pointer,
    norm_pointer,
    tangents: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    splits: tl.int64,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``y = f(z)``, ``y_dot_t = f'(z) z_dot_t`` and ``norm[t, row, split] = Σ_j y_dot_tj²``, one tile for each program."""
    DATA: tl.constexpr = z_pointer.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DATA == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    row = program // splits * ROWS + tl.arange(0, ROWS)
    coeffs = load_coefficients(coeffs_pointer, split, columns, KIND, DEGREE, PER_CHANNEL, 1, COLUMNS, VECTOR, COMPUTE)
    offset, load, own, store, _ = tile_at(row, split, rows, columns, COLUMNS, VECTOR, False)
    z = tl.load(z_pointer + offset, mask=load, other=0.0).to(COMPUTE)
    value, slope, _ = function(z, coeffs, KIND, DEGREE)
    tl.store(y_pointer + offset, value.to(DATA), mask=store)
    tangent_rows = rows * (columns // VECTOR)
    for tangent in range(0, tangents):
        at_tangent = offset + tangent * tangent_rows * VECTOR
        pushed = slope * tl.load(z_dot_pointer + at_tangent, mask=load, other=0.0).to(COMPUTE)
        tl.store(y_dot_pointer + at_tangent, pushed.to(DATA), mask=store)
        norm = tl.sum(tl.where(own, pushed * pushed, 0.0), axis=1)
        tl.store(norm_pointer + (tangent * rows + row) * splits + split, norm, mask=row < rows)


@triton.jit(
    do_not_specialize=[
        "grad_norm_stride",
        "tangents",
        "rows",
        "columns",
        "steps_per_split",
        "splits",
        "blocks_per_program",
    ]
)
def tangent_backward_kernel(
    z_pointer,
    z_dot_pointer,
    coeffs_pointer,
    grad_y_pointer,
    grad_y_dot_pointer,
    grad_norm_pointer,
    grad_z_pointer,
    grad_z_dot_pointer,
    coefficient_sums_pointer,
    grad_norm_stride: tl.int64,
    tangents: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    steps_per_split: tl.int64,
    splits: tl.int64,
    blocks_per_program: tl.int64,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The gradients of ``z``, of the tangents, and this program's sums for the coefficients.

    With ``u_t = g_t + 2 g_q f' z_dot_t`` and ``v = Σ_t u_t z_dot_t``: ``grad_z_dot_t = u_t f'``, ``grad_z = g_y f' + v f''``. A
    null pointer is a gradient that did not arrive, or a result that is not wanted.
    """
    DATA: tl.constexpr = z_pointer.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DATA == tl.float64 else tl.float32
    OF_VALUE: tl.constexpr = grad_y_pointer is not None
    OF_SLOPE: tl.constexpr = grad_y_dot_pointer is not None or grad_norm_pointer is not None
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    row_program = program // splits
    steps = tl.cdiv(columns, COLUMNS)
    first_step = split * steps_per_split
    last_step = first_step + 1 if PER_CHANNEL else tl.minimum(first_step + steps_per_split, steps)
    blocks = tl.cdiv(rows, ROWS)
    first_block = row_program * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, blocks)
    coeffs = load_coefficients(
        coeffs_pointer, first_step, columns, KIND, DEGREE, PER_CHANNEL, ROWS, COLUMNS, VECTOR, COMPUTE
    )
    if coefficient_sums_pointer is not None:
        sums = no_sums(DEGREE, ROWS, COLUMNS if PER_CHANNEL else COLUMNS // VECTOR, COMPUTE)
    tangent_rows = rows * (columns // VECTOR)
    for block in range(first_block, last_block):
        row = block * ROWS + tl.arange(0, ROWS)
        for step in range(first_step, last_step):
            offset, load, own, store, _ = tile_at(row, step, rows, columns, COLUMNS, VECTOR, False)
            z = tl.load(z_pointer + offset, mask=load, other=0.0).to(COMPUTE)
            at_value = tl.zeros_like(z)
            if grad_y_pointer is not None:
                at_value = tl.load(grad_y_pointer + offset, mask=load, other=0.0).to(COMPUTE)
            _, slope, curvature = function(z, coeffs, KIND, DEGREE)
            at_slope = tl.zeros_like(z)
            if OF_SLOPE:
                for tangent in range(0, tangents):
                    at_tangent = offset + tangent * tangent_rows * VECTOR
                    z_dot = tl.load(z_dot_pointer + at_tangent, mask=load, other=0.0).to(COMPUTE)
                    u = tl.zeros_like(z)
                    if grad_norm_pointer is not None:
                        sample = (tangent * rows + row) * grad_norm_stride
                        g_q = tl.load(grad_norm_pointer + sample, mask=row < rows, other=0.0).to(COMPUTE)[:, None]
                        u = (g_q + g_q) * (slope * z_dot)
                    if grad_y_dot_pointer is not None:
                        u += tl.load(grad_y_dot_pointer + at_tangent, mask=load, other=0.0).to(COMPUTE)
                    if grad_z_dot_pointer is not None:
                        tl.store(grad_z_dot_pointer + at_tangent, (u * slope).to(DATA), mask=store)
                    at_slope += u * z_dot
                # Outside of the data the slope may be infinite, and zero times that is not zero.
                at_slope = tl.where(own, at_slope, 0.0)
            if grad_z_pointer is not None:
                if OF_VALUE and OF_SLOPE:
                    grad_z = at_value * slope + at_slope * curvature
                elif OF_VALUE:
                    grad_z = at_value * slope
                else:
                    grad_z = at_slope * curvature
                tl.store(grad_z_pointer + offset, grad_z.to(DATA), mask=store)
            if coefficient_sums_pointer is not None:
                sums = add_coefficient_gradients(
                    sums,
                    z,
                    at_value,
                    at_slope,
                    OF_VALUE,
                    OF_SLOPE,
                    DEGREE,
                    PER_CHANNEL,
                    ROWS,
                    COLUMNS,
                    VECTOR,
                )
    if coefficient_sums_pointer is not None:
        put_coefficient_sums(
            coefficient_sums_pointer,
            sums,
            row_program,
            split,
            splits,
            columns,
            DEGREE,
            PER_CHANNEL,
            COLUMNS,
            VECTOR,
        )


# ---- the operators --------------------------------------------------------------------------------------------------


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
        return dz.zero_(), dz_dot.zero_(), torch.zeros_like(coeffs) if needs_coeffs else nothing(z)
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
        plan = _launch.channel_plan(rows, columns, itemsize, degree)
        tiles = _launch.channel_tiles(itemsize, degree)
    else:
        plan = _launch.tangent_backward_plan(rows, columns, itemsize, needs_coeffs)
        tiles = _launch.tangent_tiles(itemsize)
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


def polynomial_tangent(z: Tensor, z_dot: Tensor, coeffs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``polynomial_tangent``."""
    return _forward(z, z_dot, coeffs, "polynomial")


def polynomial_tangent_backward(
    z: Tensor,
    z_dot: Tensor,
    coeffs: Tensor,
    grad_y: Tensor | None,
    grad_y_dot: Tensor | None,
    grad_tangent_sq: Tensor | None,
    needs_z: bool,
    needs_z_dot: bool,
    needs_coeffs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``polynomial_tangent_backward``."""
    grads = (grad_y, grad_y_dot, grad_tangent_sq)
    return _backward(z, z_dot, coeffs, "polynomial", grads, (needs_z, needs_z_dot, needs_coeffs))


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

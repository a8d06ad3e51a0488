r"""The Triton kernels of ``polynomial_tangent`` and ``activation_tangent`` (SPEC 2.3).

The forward reads ``z`` once for all tangents, the backward too; every tangent is read once and written once. Tiles and
programs: :mod:`chainzrule_kernels.ops._launch`.
"""

import triton
import triton.language as tl

from chainzrule_kernels.functions.triton_functions import function, times_slope
from chainzrule_kernels.ops._tiles_triton import (
    add_coefficient_gradients,
    gradient_of_z,
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
    """``y = f(z)``, ``y_dot_t = f'(z) z_dot_t``, ``norm[t, row, split] = Σ_j y_dot_tj²``; one tile for each program."""
    DATA: tl.constexpr = z_pointer.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DATA == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    row = program // splits * ROWS + tl.arange(0, ROWS)
    coeffs = load_coefficients(coeffs_pointer, split, columns, DEGREE, PER_CHANNEL, 1, COLUMNS, VECTOR, COMPUTE)
    offset, load, own, store, _ = tile_at(row, split, rows, columns, COLUMNS, VECTOR, False)
    z = tl.load(z_pointer + offset, mask=load, other=0.0).to(COMPUTE)
    value, slope, _ = function(z, coeffs, KIND, DEGREE)
    tl.store(y_pointer + offset, value.to(DATA), mask=store)
    tangent_rows = rows * (columns // VECTOR)
    for tangent in range(tangents):
        at_tangent = offset + tangent * tangent_rows * VECTOR
        z_dot = tl.load(z_dot_pointer + at_tangent, mask=load, other=0.0).to(COMPUTE)
        pushed = times_slope(z, z_dot, slope, KIND)
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
    ],
    do_not_specialize_on_alignment=["grad_norm_pointer"],
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

    With ``u_t = g_t + 2 g_q f' z_dot_t`` and ``v = Σ_t u_t z_dot_t``: ``grad_z_dot_t = u_t f'`` and
    ``grad_z = g_y f' + v f''``. A null pointer is a gradient that did not arrive, or a result that is not wanted.
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
    coeffs = load_coefficients(coeffs_pointer, first_step, columns, DEGREE, PER_CHANNEL, ROWS, COLUMNS, VECTOR, COMPUTE)
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
                for tangent in range(tangents):
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
                        tl.store(grad_z_dot_pointer + at_tangent, times_slope(z, u, slope, KIND).to(DATA), mask=store)
                    at_slope += u * z_dot
                # Outside of the data the slope may be infinite, and zero times that is not zero.
                at_slope = tl.where(own, at_slope, 0.0)
            if grad_z_pointer is not None:
                grad_z = gradient_of_z(z, at_value, at_slope, slope, curvature, OF_VALUE, OF_SLOPE, KIND)
                tl.store(grad_z_pointer + offset, grad_z.to(DATA), mask=store)
            if coefficient_sums_pointer is not None:
                sums = add_coefficient_gradients(
                    sums,
                    z,
                    at_value,
                    at_slope,
                    OF_VALUE,
                    OF_SLOPE,
                    KIND,
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

r"""The Triton kernels of ``polynomial``, ``polynomial_dreg`` and ``activation_dreg`` (SPEC 2.2).

The forward reads ``z`` once and writes ``y`` once (and ``f'`` where it is asked for); the norm is summed on the way.
The backward reads ``z`` and the gradients that arrived once, writes ``dz`` once, and keeps the sums for the
parameters in registers. Tiles and programs: :mod:`chainzrule_kernels.ops._launch`.
"""

import triton
import triton.language as tl

from chainzrule_kernels.functions.triton_functions import function
from chainzrule_kernels.ops._tiles_triton import (
    add_coefficient_gradients,
    channels_at,
    gradient_of_z,
    load_channels,
    load_coefficients,
    no_sums,
    put_coefficient_sums,
    tail_of,
    tile_at,
    within_vectors,
)


@triton.jit
def put_value_and_slope(
    z,
    coeffs,
    offset,
    own,
    store,
    y_pointer,
    derivative_pointer,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
):
    """Stores ``f(z)``, and ``f'(z)`` where it has a pointer; ``f'(z)²`` where it is summed, zero elsewhere."""
    DATA: tl.constexpr = y_pointer.dtype.element_ty
    value, slope, _ = function(z, coeffs, KIND, DEGREE)
    tl.store(y_pointer + offset, value.to(DATA), mask=store)
    if derivative_pointer is not None:
        tl.store(derivative_pointer + offset, slope.to(DATA), mask=store)
    return tl.where(own, slope * slope, 0.0)


@triton.jit(do_not_specialize=["rows", "columns", "steps_per_split", "splits"])
def dreg_forward_kernel(
    z_pointer,
    coeffs_pointer,
    y_pointer,
    derivative_pointer,
    norm_pointer,
    rows: tl.int64,
    columns: tl.int64,
    steps_per_split: tl.int64,
    splits: tl.int64,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """``y = f(z)``; where they have a pointer, ``derivative = f'(z)`` and ``norm[row, split] = Σ_j f'(z_j)²``.

    The same function for all channels. A program goes through the columns of its rows.
    """
    DATA: tl.constexpr = z_pointer.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DATA == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    row = program // splits * ROWS + tl.arange(0, ROWS)
    steps = tl.cdiv(columns + (VECTOR - 1 if SHIFTED else 0), COLUMNS)
    first_step = split * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, steps)
    squares = tl.zeros((ROWS, COLUMNS // VECTOR), dtype=COMPUTE)
    coeffs = load_coefficients(coeffs_pointer, 0, columns, DEGREE, False, ROWS, COLUMNS, VECTOR, COMPUTE)
    for step in range(first_step, last_step):
        offset, load, own, store, _ = tile_at(row, step, rows, columns, COLUMNS, VECTOR, SHIFTED)
        z = tl.load(z_pointer + offset, mask=load, other=0.0).to(COMPUTE)
        square = put_value_and_slope(z, coeffs, offset, own, store, y_pointer, derivative_pointer, KIND, DEGREE)
        if norm_pointer is not None:
            squares += within_vectors(square, ROWS, COLUMNS, VECTOR)
    norm = tl.sum(squares, axis=1)
    if SHIFTED:
        if split == splits - 1:
            offset, own = tail_of(row, rows, columns, VECTOR)
            z = tl.load(z_pointer + offset, mask=own, other=0.0).to(COMPUTE)
            square = put_value_and_slope(z, coeffs, offset, own, own, y_pointer, derivative_pointer, KIND, DEGREE)
            norm += tl.sum(square, axis=1)
    if norm_pointer is not None:
        tl.store(norm_pointer + row * splits + split, norm, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "columns", "splits", "blocks_per_program"])
def dreg_channel_forward_kernel(
    z_pointer,
    coeffs_pointer,
    row_sq_pointer,
    y_pointer,
    derivative_pointer,
    norm_pointer,
    rows: tl.int64,
    columns: tl.int64,
    splits: tl.int64,
    blocks_per_program: tl.int64,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The same, with ``row_sq`` or coefficients for each channel: ``norm[row, split] = Σ_j f'(z_j)² row_sq_j``.

    A program stays in one column of tiles, keeps in registers what belongs to its channels, and goes through its rows;
    ``UNROLL`` tiles are loaded at once.
    """
    DATA: tl.constexpr = z_pointer.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DATA == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    first_block = program // splits * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, tl.cdiv(rows, ROWS))
    coeffs = load_coefficients(coeffs_pointer, split, columns, DEGREE, PER_CHANNEL, ROWS, COLUMNS, VECTOR, COMPUTE)
    if row_sq_pointer is not None:
        row_sq = load_channels(row_sq_pointer, 0, split, columns, ROWS, COLUMNS, VECTOR, COMPUTE)
    for group in range(first_block, last_block, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            row = (group + u) * ROWS + tl.arange(0, ROWS)
            offset, load, _, _, _ = tile_at(row, split, rows, columns, COLUMNS, VECTOR, False)
            loaded = loaded + (tl.load(z_pointer + offset, mask=load, other=0.0),)
        for u in tl.static_range(UNROLL):
            row = (group + u) * ROWS + tl.arange(0, ROWS)
            offset, _, own, store, _ = tile_at(row, split, rows, columns, COLUMNS, VECTOR, False)
            z = loaded[u].to(COMPUTE)
            square = put_value_and_slope(z, coeffs, offset, own, store, y_pointer, derivative_pointer, KIND, DEGREE)
            if norm_pointer is not None:
                if row_sq_pointer is not None:
                    square = square * row_sq
                tl.store(norm_pointer + row * splits + split, tl.sum(square, axis=1), mask=row < rows)


@triton.jit
def arriving_at_slope(
    slope,
    offset,
    load,
    beyond,
    own,
    row,
    rows,
    row_sq,
    grad_norm_pointer,
    grad_norm_stride,
    grad_derivative_pointer,
    COLUMNS: tl.constexpr,
    SHIFTED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """``h = 2 g_s row_sq f' + g_d`` where it is stored, the same where it is summed (zero elsewhere), and ``g_s``."""
    h = tl.zeros_like(slope)
    g_s = h
    if grad_norm_pointer is not None:
        g_s = tl.load(grad_norm_pointer + row * grad_norm_stride, mask=row < rows, other=0.0).to(COMPUTE)[:, None]
        if SHIFTED:
            # The last vector of a row holds the first elements of the next.
            next_row = row + 1
            g_next = tl.load(grad_norm_pointer + next_row * grad_norm_stride, mask=next_row < rows, other=0.0)
            g_s = tl.where(tl.arange(0, COLUMNS)[None, :] < beyond, g_s, g_next.to(COMPUTE)[:, None])
        h = (g_s + g_s) * slope * row_sq
    if grad_derivative_pointer is not None:
        h += tl.load(grad_derivative_pointer + offset, mask=load, other=0.0).to(COMPUTE)
    return h, tl.where(own, h, 0.0), g_s


@triton.jit
def put_gradient(
    z,
    at_value,
    coeffs,
    sums,
    offset,
    load,
    own,
    store,
    beyond,
    row,
    rows,
    row_sq,
    grad_norm_pointer,
    grad_norm_stride,
    grad_derivative_pointer,
    grad_z_pointer,
    OF_VALUE: tl.constexpr,
    SUMS: tl.constexpr,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Stores ``grad_z`` of a tile where it has a pointer.

    Returns ``sums`` with what the tile adds to them where there are ``SUMS``, and what it adds to that of ``row_sq``.
    """
    OF_SLOPE: tl.constexpr = grad_norm_pointer is not None or grad_derivative_pointer is not None
    _, slope, curvature = function(z, coeffs, KIND, DEGREE)
    h, at_slope, g_s = arriving_at_slope(
        slope, offset, load, beyond, own, row, rows, row_sq,
        grad_norm_pointer, grad_norm_stride, grad_derivative_pointer,
        COLUMNS, SHIFTED, COMPUTE,
    )  # fmt: skip
    if grad_z_pointer is not None:
        grad_z = gradient_of_z(z, at_value, h, slope, curvature, OF_VALUE, OF_SLOPE, KIND)
        tl.store(grad_z_pointer + offset, grad_z.to(grad_z_pointer.dtype.element_ty), mask=store)
    if SUMS:
        if SHIFTED:
            z = tl.where(own, z, 0.0)
            at_value = tl.where(own, at_value, 0.0)
        sums = add_coefficient_gradients(
            sums, z, at_value, at_slope, OF_VALUE, OF_SLOPE, KIND, DEGREE, PER_CHANNEL, ROWS, COLUMNS, VECTOR
        )
    return sums, tl.where(own, g_s * slope * slope, 0.0)


@triton.jit(
    do_not_specialize=["grad_norm_stride", "rows", "columns", "steps_per_split", "splits", "blocks_per_program"],
    do_not_specialize_on_alignment=["grad_norm_pointer"],
)
def dreg_backward_kernel(
    z_pointer,
    coeffs_pointer,
    grad_y_pointer,
    grad_norm_pointer,
    grad_derivative_pointer,
    grad_z_pointer,
    coefficient_sums_pointer,
    grad_norm_stride: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    steps_per_split: tl.int64,
    splits: tl.int64,
    blocks_per_program: tl.int64,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """``grad_z = g_y f' + h f''`` with ``h = 2 g_s f' + g_d``, and this program's sums for the shared coefficients.

    A null pointer is a gradient that did not arrive, or a result that is not wanted.
    """
    COMPUTE: tl.constexpr = tl.float64 if z_pointer.dtype.element_ty == tl.float64 else tl.float32
    OF_VALUE: tl.constexpr = grad_y_pointer is not None
    SUMS: tl.constexpr = coefficient_sums_pointer is not None
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    row_program = program // splits
    steps = tl.cdiv(columns + (VECTOR - 1 if SHIFTED else 0), COLUMNS)
    first_step = split * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, steps)
    first_block = row_program * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, tl.cdiv(rows, ROWS))
    coeffs = load_coefficients(coeffs_pointer, 0, columns, DEGREE, False, ROWS, COLUMNS, VECTOR, COMPUTE)
    sums = no_sums(DEGREE, ROWS, COLUMNS // VECTOR, COMPUTE) if SUMS else ()
    for block in range(first_block, last_block):
        row = block * ROWS + tl.arange(0, ROWS)
        for step in range(first_step, last_step):
            offset, load, own, store, beyond = tile_at(row, step, rows, columns, COLUMNS, VECTOR, SHIFTED)
            z = tl.load(z_pointer + offset, mask=load, other=0.0).to(COMPUTE)
            at_value = tl.zeros_like(z)
            if grad_y_pointer is not None:
                at_value = tl.load(grad_y_pointer + offset, mask=load, other=0.0).to(COMPUTE)
            sums, _ = put_gradient(
                z, at_value, coeffs, sums, offset, load, own, store, beyond, row, rows, 1.0,
                grad_norm_pointer, grad_norm_stride, grad_derivative_pointer, grad_z_pointer,
                OF_VALUE, SUMS, KIND, DEGREE, False, ROWS, COLUMNS, VECTOR, SHIFTED, COMPUTE,
            )  # fmt: skip
    if SHIFTED:
        if split == splits - 1:
            row = (last_block - 1) * ROWS + tl.arange(0, ROWS)
            offset, own = tail_of(row, rows, columns, VECTOR)
            z = tl.load(z_pointer + offset, mask=own, other=0.0).to(COMPUTE)
            at_value = tl.zeros_like(z)
            if grad_y_pointer is not None:
                at_value = tl.load(grad_y_pointer + offset, mask=own, other=0.0).to(COMPUTE)
            of_tail = no_sums(DEGREE, ROWS, 1, COMPUTE) if SUMS else ()
            of_tail, _ = put_gradient(
                z, at_value, coeffs, of_tail, offset, own, own, own, 0, row, rows, 1.0,
                grad_norm_pointer, grad_norm_stride, grad_derivative_pointer, grad_z_pointer,
                OF_VALUE, SUMS, KIND, DEGREE, False, ROWS, VECTOR, VECTOR, False, COMPUTE,
            )  # fmt: skip
            if SUMS:
                with_tail = ()
                for k in tl.static_range(DEGREE + 1):
                    first_sum = tl.arange(0, COLUMNS // VECTOR)[None, :] == 0
                    with_tail = with_tail + (sums[k] + tl.where(first_sum, of_tail[k], 0.0),)
                sums = with_tail
    if SUMS:
        put_coefficient_sums(
            coefficient_sums_pointer, sums, row_program, split, splits, columns, DEGREE, False, COLUMNS, VECTOR
        )


@triton.jit(
    do_not_specialize=["grad_norm_stride", "rows", "columns", "splits", "blocks_per_program"],
    do_not_specialize_on_alignment=["grad_norm_pointer"],
)
def dreg_channel_backward_kernel(
    z_pointer,
    coeffs_pointer,
    row_sq_pointer,
    grad_y_pointer,
    grad_norm_pointer,
    grad_derivative_pointer,
    grad_z_pointer,
    coefficient_sums_pointer,
    row_sq_sums_pointer,
    grad_norm_stride: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    splits: tl.int64,
    blocks_per_program: tl.int64,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The same with ``h = 2 g_s row_sq f' + g_d``, and sums for the coefficients and for ``row_sq``.

    A program stays in one column of tiles, keeps in registers what belongs to its channels, and goes through its rows;
    ``UNROLL`` tiles are loaded at once.
    """
    COMPUTE: tl.constexpr = tl.float64 if z_pointer.dtype.element_ty == tl.float64 else tl.float32
    OF_VALUE: tl.constexpr = grad_y_pointer is not None
    SUMS: tl.constexpr = coefficient_sums_pointer is not None
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    row_program = program // splits
    first_block = row_program * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, tl.cdiv(rows, ROWS))
    coeffs = load_coefficients(coeffs_pointer, split, columns, DEGREE, PER_CHANNEL, ROWS, COLUMNS, VECTOR, COMPUTE)
    row_sq = 1.0
    if row_sq_pointer is not None:
        row_sq = load_channels(row_sq_pointer, 0, split, columns, ROWS, COLUMNS, VECTOR, COMPUTE)
    sums = no_sums(DEGREE, ROWS, COLUMNS if PER_CHANNEL else COLUMNS // VECTOR, COMPUTE) if SUMS else ()
    if row_sq_sums_pointer is not None:
        row_sq_sums = tl.zeros((ROWS, COLUMNS), dtype=COMPUTE)
    for group in range(first_block, last_block, UNROLL):
        loaded_z = ()
        loaded_grad_y = ()
        for u in tl.static_range(UNROLL):
            row = (group + u) * ROWS + tl.arange(0, ROWS)
            offset, load, _, _, _ = tile_at(row, split, rows, columns, COLUMNS, VECTOR, False)
            loaded_z = loaded_z + (tl.load(z_pointer + offset, mask=load, other=0.0),)
            if grad_y_pointer is not None:
                loaded_grad_y = loaded_grad_y + (tl.load(grad_y_pointer + offset, mask=load, other=0.0),)
        for u in tl.static_range(UNROLL):
            row = (group + u) * ROWS + tl.arange(0, ROWS)
            offset, load, own, store, beyond = tile_at(row, split, rows, columns, COLUMNS, VECTOR, False)
            z = loaded_z[u].to(COMPUTE)
            at_value = tl.zeros_like(z)
            if grad_y_pointer is not None:
                at_value = loaded_grad_y[u].to(COMPUTE)
            sums, of_row_sq = put_gradient(
                z, at_value, coeffs, sums, offset, load, own, store, beyond, row, rows, row_sq,
                grad_norm_pointer, grad_norm_stride, grad_derivative_pointer, grad_z_pointer,
                OF_VALUE, SUMS, KIND, DEGREE, PER_CHANNEL, ROWS, COLUMNS, VECTOR, False, COMPUTE,
            )  # fmt: skip
            if row_sq_sums_pointer is not None:
                row_sq_sums += of_row_sq
    if SUMS:
        put_coefficient_sums(
            coefficient_sums_pointer, sums, row_program, split, splits, columns, DEGREE, PER_CHANNEL, COLUMNS, VECTOR
        )
    if row_sq_sums_pointer is not None:
        channel, exists = channels_at(split, columns, COLUMNS, VECTOR)
        start = row_program * (columns // VECTOR) * VECTOR
        tl.store(row_sq_sums_pointer + (start + channel), tl.sum(row_sq_sums, axis=0)[None, :], mask=exists)

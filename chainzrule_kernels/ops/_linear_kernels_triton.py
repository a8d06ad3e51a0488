r"""The Triton kernel of ``linear_polynomial_dreg`` and ``linear_activation_dreg``: all of it in one product (SPEC 2.2).

``z = x Wᵀ + b`` is summed in float32 in registers; value, slope and norm are computed from that sum, before ``z`` is
rounded for storage. Tiles and the choice between this and the library's product: :mod:`chainzrule_kernels.ops._launch`.
"""

import triton
import triton.language as tl

from chainzrule_kernels.functions.triton_functions import function


@triton.jit
def of_channels(pointer, channel, exists, COMPUTE: tl.constexpr):
    """One number for each channel, as ``(1, COLUMNS)``."""
    return tl.load(pointer + channel, mask=exists, other=0.0).to(COMPUTE)[None, :]


@triton.jit
def column_slices(tile, SLICES: tl.constexpr):
    """The tile ``(ROWS, COLUMNS)`` cut into ``SLICES`` (a power of two) of fewer columns, from left to right."""
    if SLICES == 1:
        return (tile,)
    else:
        halves = tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        return column_slices(left, SLICES // 2) + column_slices(right, SLICES // 2)


@triton.jit(do_not_specialize=["rows", "columns", "inner"])
def linear_dreg_kernel(
    x_pointer,
    weight_pointer,
    bias_pointer,
    row_sq_pointer,
    coeffs_pointer,
    y_pointer,
    z_pointer,
    norm_pointer,
    rows: tl.int64,
    columns: tl.int64,
    inner: tl.int64,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    """``y = f(x Wᵀ + b)`` and ``norm[row, column tile] = Σ_j f'(z_j)² row_sq_j``; ``z`` where it has a pointer.

    ``x (rows, inner)``, ``W (columns, inner)``; ``inner`` and ``columns`` are multiples of ``VECTOR``. One tile of the
    result for each program; ``GROUP`` tiles above one another follow each other, so that they find the same rows of
    ``W`` in the second-level cache.
    """
    DATA: tl.constexpr = x_pointer.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DATA == tl.float64 else tl.float32
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    first_row_tile = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first_row_tile, GROUP)
    within = program - first_row_tile * column_tiles
    row_tile = first_row_tile + within % height
    column_tile = within // height

    row = row_tile * ROWS + tl.arange(0, ROWS)
    channel = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    along = tl.arange(0, INNER)
    vector_start = along // VECTOR * VECTOR
    # Beyond the last row or channel the last one is read once more. The product with VECTOR comes last, so that the
    # compiler sees what an offset is a multiple of.
    vectors = inner // VECTOR
    x_tile = x_pointer + (tl.minimum(row, rows - 1) * vectors * VECTOR)[:, None] + along[None, :]
    weight_tile = weight_pointer + (tl.minimum(channel, columns - 1) * vectors * VECTOR)[None, :] + along[:, None]
    z = tl.zeros((ROWS, COLUMNS), dtype=COMPUTE)
    for step in range(tl.cdiv(inner, INNER)):
        # Constant over a vector, so that a vector stays one load.
        present = vector_start < tl.minimum(inner - step * INNER, INNER).to(tl.int32)
        x = tl.load(x_tile, mask=present[None, :], other=0.0)
        weight = tl.load(weight_tile, mask=present[:, None], other=0.0)
        # Triton 3.6 and 3.7 take float32 for the dtype of the result unless told, and refuse another z.
        z = tl.dot(x, weight, z, input_precision=PRECISION, out_dtype=COMPUTE)
        x_tile += INNER
        weight_tile += INNER

    # Slice by slice, because a whole tile of values and slopes beside the sums has no room in registers.
    WIDTH: tl.constexpr = COLUMNS // SLICES
    column = tl.arange(0, WIDTH)
    row_offset = row * (columns // VECTOR) * VECTOR
    norm = tl.zeros((ROWS,), dtype=COMPUTE)
    slices = column_slices(z, SLICES)
    for part in tl.static_range(SLICES):
        z = slices[part]
        first_column = column_tile * COLUMNS + part * WIDTH
        channel = first_column + column
        exists = channel < columns
        if bias_pointer is not None:
            z += of_channels(bias_pointer, channel, exists, COMPUTE)
        coeffs = ()
        if KIND == "polynomial":
            for k in tl.static_range(DEGREE + 1):
                if PER_CHANNEL:
                    coeffs = coeffs + (of_channels(coeffs_pointer + k * columns, channel, exists, COMPUTE),)
                else:
                    coeffs = coeffs + (tl.load(coeffs_pointer + k).to(COMPUTE),)
        value, slope, _ = function(z, coeffs, KIND, DEGREE)
        end = tl.minimum(tl.maximum(columns - first_column, 0), WIDTH).to(tl.int32)
        store = (row < rows)[:, None] & (column // VECTOR * VECTOR < end)[None, :]
        offset = (row_offset + first_column)[:, None] + column[None, :]
        tl.store(y_pointer + offset, value.to(DATA), mask=store)
        if z_pointer is not None:
            tl.store(z_pointer + offset, z.to(DATA), mask=store)
        # Beyond the last channel row_sq is zero, but the slope may be infinite.
        square = slope * slope * of_channels(row_sq_pointer, channel, exists, COMPUTE)
        norm += tl.sum(tl.where(exists[None, :], square, 0.0), axis=1)
    tl.store(norm_pointer + row * column_tiles + column_tile, norm, mask=row < rows)

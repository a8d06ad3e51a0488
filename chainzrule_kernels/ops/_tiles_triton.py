"""Where the elements of a tile lie, which of them a program loads, owns and stores, and how it sums them.

Shared by the Triton kernels of ``*_dreg`` and ``*_tangent``; the words are those of
:mod:`chainzrule_kernels.ops._launch`.
"""

import triton
import triton.language as tl

from chainzrule_kernels.functions.triton_functions import rectified, times_curvature, times_slope, where_rising


@triton.jit
def tile_at(
    row,
    step,
    rows,
    columns,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """The tile of the rows ``row`` (int64) at the column step ``step``.

    Returns the offsets of its elements, and three masks: what to load, what belongs to these rows, and what to store.
    The first and the last are constant over a vector, so that a vector stays one load or store; so is the second
    unless rows are shifted. The last result is the first column beyond the row, as seen from the tile.
    """
    column = tl.arange(0, COLUMNS)
    vector_start = column // VECTOR * VECTOR
    first_column = step * COLUMNS
    in_batch = (row < rows)[:, None]
    if SHIFTED:
        begin = row * columns
        start = begin // VECTOR * VECTOR + first_column
        # Whole vectors only: the last elements of the matrix are left to tail_of.
        whole = tl.minimum(tl.maximum(rows * columns // VECTOR * VECTOR - start, 0), COLUMNS).to(tl.int32)
        lower = tl.minimum(tl.maximum(begin - start, 0), COLUMNS).to(tl.int32)
        upper = tl.minimum(tl.maximum(begin + columns - start, 0), COLUMNS).to(tl.int32)
        end = tl.minimum(upper, whole)
        load = (vector_start[None, :] < end[:, None]) & in_batch
        own = (column[None, :] >= lower[:, None]) & (column[None, :] < end[:, None]) & in_batch
        store = load & (vector_start[None, :] >= lower[:, None])
        beyond = upper[:, None]
    else:
        # The product with VECTOR comes last, so that the compiler sees what it is a multiple of.
        start = row * (columns // VECTOR) * VECTOR + first_column
        end = tl.minimum(tl.maximum(columns - first_column, 0), COLUMNS).to(tl.int32)
        load = (vector_start < end)[None, :] & in_batch
        own = load
        store = load
        beyond = end
    return start[:, None] + column[None, :], load, own, store, beyond


@triton.jit
def tail_of(row, rows, columns, VECTOR: tl.constexpr):
    """The last elements of the matrix, fewer than a vector: offsets and mask of a tile ``(rows, VECTOR)``."""
    elements = rows * columns
    offset = elements // VECTOR * VECTOR + tl.arange(0, VECTOR)
    mask = (row == rows - 1)[:, None] & (offset < elements)[None, :]
    return offset[None, :] + tl.zeros_like(row)[:, None], mask


@triton.jit
def channels_at(step, columns, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """The channels of the tile at ``step``, and which of them exist, as ``(1, COLUMNS)``."""
    column = tl.arange(0, COLUMNS)
    first_column = step * COLUMNS
    end = tl.minimum(tl.maximum(columns - first_column, 0), COLUMNS).to(tl.int32)
    return (first_column + column)[None, :], (column // VECTOR * VECTOR < end)[None, :]


@triton.jit
def load_channels(
    pointer,
    index,
    step,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Row ``index`` of a matrix with one column for each channel, as ``(ROWS, COLUMNS)``; every row is the same.

    With ``ROWS`` those of the tile, every thread loads the channels of its own elements: nothing has to change hands.
    """
    channel, mask = channels_at(step, columns, COLUMNS, VECTOR)
    offset = index * (columns // VECTOR) * VECTOR + channel + tl.zeros((ROWS, 1), dtype=tl.int64)
    return tl.load(pointer + offset, mask=mask & (tl.zeros((ROWS, 1), dtype=tl.int32) == 0), other=0.0).to(COMPUTE)


@triton.jit
def load_coefficients(
    pointer,
    step,
    columns,
    DEGREE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The coefficients: scalars, or ``(ROWS, COLUMNS)`` where channels have their own; none for activations."""
    coeffs = ()
    if DEGREE > 0:
        for k in tl.static_range(DEGREE + 1):
            if PER_CHANNEL:
                coeffs = coeffs + (load_channels(pointer, k, step, columns, ROWS, COLUMNS, VECTOR, COMPUTE),)
            else:
                coeffs = coeffs + (tl.load(pointer + k).to(COMPUTE),)
    return coeffs


@triton.jit
def within_vectors(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """Sums over vectors, which lie in one thread: ``(ROWS, COLUMNS)`` to ``(ROWS, COLUMNS / VECTOR)``."""
    return tl.sum(tl.reshape(values, (ROWS, COLUMNS // VECTOR, VECTOR)), axis=2)


@triton.jit
def no_sums(DEGREE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr):
    """``DEGREE + 1`` sums that are zero."""
    sums = ()
    for _ in tl.static_range(DEGREE + 1):
        sums = sums + (tl.zeros((ROWS, COLUMNS), dtype=COMPUTE),)
    return sums


@triton.jit
def add_coefficient_gradients(
    sums,
    z,
    at_value,
    at_slope,
    OF_VALUE: tl.constexpr,
    OF_SLOPE: tl.constexpr,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Adds to ``sums[k]`` what a tile contributes to the gradient of coefficient ``k``.

    That is ``g z^k + h k z^(k-1)``, where ``g = at_value`` arrives at ``p`` and ``h = at_slope`` at ``p'``; with
    ``relu(z)`` for ``z``, and ``h`` only where that rises, if the polynomial is rectified. Elements that do not count
    must have all three zero.
    """
    if KIND == "rectified_polynomial":
        z = rectified(z)
        at_slope = where_rising(z, at_slope)
    added = ()
    power = z
    for k in tl.static_range(DEGREE + 1):
        if k == 0:
            term = at_value
        elif OF_VALUE and OF_SLOPE:
            term = at_value * z + k * at_slope
        elif OF_VALUE:
            term = at_value * z
        else:
            term = k * at_slope
        if k >= 2:
            if k > 2:
                power = power * z
            term = term * power
        if PER_CHANNEL:
            added = added + (sums[k] + term,)
        else:
            added = added + (sums[k] + within_vectors(term, ROWS, COLUMNS, VECTOR),)
    return added


@triton.jit
def gradient_of_z(z, at_value, h, slope, curvature, OF_VALUE: tl.constexpr, OF_SLOPE: tl.constexpr, KIND: tl.constexpr):
    """``g_y f' + h f''``, of which an absent gradient's part is absent, not zero."""
    if OF_VALUE and OF_SLOPE:
        return times_slope(z, at_value, slope, KIND) + times_curvature(z, h, curvature, KIND)
    elif OF_VALUE:
        return times_slope(z, at_value, slope, KIND)
    else:
        return times_curvature(z, h, curvature, KIND)


@triton.jit
def put_coefficient_sums(
    pointer,
    sums,
    row_program,
    split,
    splits,
    columns,
    DEGREE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Leaves a program's sums: ``(row_program, k, channel)``; for shared coefficients ``(row_program, split, k)``."""
    if PER_CHANNEL:
        channel, mask = channels_at(split, columns, COLUMNS, VECTOR)
        for k in tl.static_range(DEGREE + 1):
            start = (row_program * (DEGREE + 1) + k) * (columns // VECTOR) * VECTOR
            tl.store(pointer + (start + channel), tl.sum(sums[k], axis=0)[None, :], mask=mask)
    else:
        start = (row_program * splits + split) * (DEGREE + 1)
        for k in tl.static_range(DEGREE + 1):
            tl.store(pointer + start + k, tl.sum(tl.sum(sums[k], axis=1), axis=0))

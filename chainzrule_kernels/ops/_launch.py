r"""How the Triton kernels cut their work: the one place with launch parameters.

A kernel sees its data as a matrix of ``rows`` samples by ``columns`` channels and works on tiles of it. There is no
tuning at run time. A tile comes from the short tables below, and the number of programs from the shape alone, so that
sums are added in an order that depends on nothing but the shape: the same input gives the same bits. What varies with
the shape is an ordinary argument of the kernel; what is compiled in is the tile. A new shape therefore compiles
nothing once the tiles of its kernel are compiled, and :func:`forward_tiles` and its sisters say which those are.

Vectors
    A thread moves 16 bytes at a time: ``vector = 16 / itemsize`` elements. Which of three ways applies depends on the
    width of a row.

    * *aligned*: ``columns`` is a multiple of ``vector``, so every row begins on a 16-byte boundary.
    * *shifted*: it is not, but nothing depends on the channel (shared coefficients, no ``row_sq``), and a row is at
    least
      ``SHIFTED_COLUMNS`` wide. A row is then read from the boundary at or before its first element; the vector that two
      rows share is read twice and written once. The last elements of the matrix, fewer than ``vector``, go one by one.
    * *single*: neither. One element at a time, coalesced. This is what odd widths cost.

Tiles
    ``narrow`` for rows of at most ``NARROW_COLUMNS``, ``wide`` for few rows, ``middle`` for everything else. In a
    forward every thread has four 16-byte loads in flight; in a backward two from each tensor, since it keeps sums in
    registers.

Programs
    A forward that sums over the channels gives every program whole rows, unless there are too few to fill a GPU; then
    it splits rows of more than ``WHOLE_ROW_STEPS`` tiles and a second stage adds the parts. A backward that sums over
    the samples gives every program a run of rows and leaves one partial sum for each program, which a second stage
    adds. Both second stages are a ``torch.sum`` over a small float32 buffer. ``PROGRAMS`` is a few programs for each
    multiprocessor of the largest GPU at hand (132 on an H100 or H200, 304 on an MI300X).

Sums
    No register takes more than ``ADDITIONS`` terms one after another: where a program would have more work, there are
    more programs. A sum of ``n`` equal terms may be wrong by ``n`` half units in the last place, and over the rows of a
    large batch that would be seen. What is added inside a tile is added in a tree, the second stage of a parameter's
    gradient in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

PROGRAMS = 2048
NARROW_COLUMNS = 64
WIDE_COLUMNS = 2048
SHIFTED_COLUMNS = 65
ADDITIONS = 64
# Of a thread: three programs of 128 threads for each multiprocessor.
REGISTERS = 168
# A row of so few tiles is gone through sooner than a second kernel is launched.
WHOLE_ROW_STEPS = 4
# Of a run of rows that leaves one sum for each channel: enough for the sums to be small beside the data.
ROWS_PER_SUM = 64


# Compared by identity, which is quick: there is one of each.
@dataclass(frozen=True, eq=False)
class Tile:
    """What is compiled into a kernel.

    Attributes:
        rows: of the tile.
        columns: of the tile.
        vector: elements that a thread moves at once.
        shifted: whether rows are read from the boundary before their first element.
        unroll: tiles above one another that are loaded at once.
        warps: of a program, at 32 threads each.
        registers: that a thread may have on an NVIDIA GPU; None leaves it to the assembler, which now and then spills a
            few rather than run one program less at a time.
    """

    rows: int
    columns: int
    vector: int
    shifted: bool = False
    unroll: int = 1
    warps: int = 4
    registers: int | None = None

    @property
    def name(self) -> str:
        """Short, for tables."""
        way = "shifted" if self.shifted else "aligned" if self.vector > 1 else "single"
        return f"{self.rows}x{self.columns} {way}"

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel may want to know of it, by the name of its parameter."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "VECTOR": self.vector,
            "SHIFTED": self.shifted,
            "UNROLL": self.unroll,
        }

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler for NVIDIA GPUs is told beside the number of warps."""
        return {} if self.registers is None else {"maxnreg": self.registers}


@dataclass(frozen=True)
class Plan:
    """How one call is cut.

    Attributes:
        tile: what each program works on at a time.
        steps_per_split: tiles side by side that one program goes through.
        splits: programs side by side over the columns.
        blocks_per_program: tiles above one another that one program goes through.
        row_programs: programs above one another over the rows.
    """

    tile: Tile
    steps_per_split: int
    splits: int
    blocks_per_program: int
    row_programs: int

    @property
    def programs(self) -> int:
        """How many programs run."""
        return self.splits * self.row_programs


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _cut(rows: int, columns: int, tile: Tile, steps_per_split: int, blocks_per_program: int) -> Plan:
    """The plan with about this much work for each program."""
    steps = max(1, _ceil_div(columns + (tile.vector - 1 if tile.shifted else 0), tile.columns))
    blocks = max(1, _ceil_div(rows, tile.rows))
    steps_per_split = max(1, min(steps, steps_per_split))
    blocks_per_program = max(1, min(blocks, blocks_per_program))
    return Plan(
        tile,
        steps_per_split,
        _ceil_div(steps, steps_per_split),
        blocks_per_program,
        _ceil_div(blocks, blocks_per_program),
    )


def _choose(tiles: dict[str, Tile], rows: int, columns: int, programs: int) -> Tile:
    """By the width of a row, and by the number of rows where the tiles of many rows would leave a GPU idle."""
    if columns <= NARROW_COLUMNS:
        return tiles["narrow"]
    middle = tiles["middle"]
    if columns <= WIDE_COLUMNS and rows >= middle.rows * programs // 8:
        return middle
    return tiles["wide"]


# ---- the forward of *_dreg -------------------------------------------------------------------------------------------


@cache
def _forward_tiles(vector: int, shifted: bool) -> dict[str, Tile]:
    """Polynomials."""
    # Four vectors for each thread, or eight elements where there are no vectors.
    return {
        "narrow": Tile(16 * vector, 32, vector) if vector > 1 else Tile(128, 8, vector),
        "middle": Tile(2 * vector, 256, vector, shifted),
        "wide": Tile(1, 512 * vector, vector, shifted),
    }


@cache
def _tiles_of_two_vectors(vector: int, shifted: bool) -> dict[str, Tile]:
    """The forward of activations, which need registers for more than the polynomial does, and every backward."""
    # Two vectors for each thread, or four elements.
    return {
        "narrow": Tile(8 * vector, 32, vector) if vector > 1 else Tile(64, 8, 1),
        "middle": Tile(vector, 256, vector, shifted),
        "wide": Tile(1, 256 * vector, vector, shifted, registers=REGISTERS if shifted else None),
    }


def _vector_and_shift(columns: int, itemsize: int) -> tuple[int, bool]:
    vector = 16 // itemsize
    if columns % vector == 0:
        return vector, False
    shifted = columns >= SHIFTED_COLUMNS
    return vector if shifted else 1, shifted


@lru_cache(maxsize=4096)
def forward_plan(rows: int, columns: int, itemsize: int, activation: bool = False) -> Plan:
    """For a pass with the same function for all channels that sums over the channels of each row.

    Args:
        rows: samples.
        columns: channels.
        itemsize: of an element, in bytes.
        activation: whether the function is a fixed activation.
    """
    vector, shifted = _vector_and_shift(columns, itemsize)
    tiles = _tiles_of_two_vectors if activation else _forward_tiles
    tile = _choose(tiles(vector, shifted), rows, columns, PROGRAMS)
    blocks = max(1, _ceil_div(rows, tile.rows))
    steps = _ceil_div(columns + vector - 1, tile.columns)
    # Whole rows for each program, if that makes programs enough, or if a second stage would cost more than the row.
    parts = 1 if 4 * blocks >= PROGRAMS or steps <= WHOLE_ROW_STEPS else _ceil_div(PROGRAMS, blocks)
    return _cut(rows, columns, tile, min(_ceil_div(steps, parts), ADDITIONS), 1)


@cache
def forward_tiles(itemsize: int, activation: bool = False) -> list[Tile]:
    """Every tile that :func:`forward_plan` can choose."""
    return _with_and_without_shift(_tiles_of_two_vectors if activation else _forward_tiles, itemsize)


def _with_and_without_shift(tiles: Callable[[int, bool], dict[str, Tile]], itemsize: int) -> list[Tile]:
    vector = 16 // itemsize
    shifted = tiles(vector, True)
    return [*tiles(vector, False).values(), tiles(1, False)["narrow"], shifted["middle"], shifted["wide"]]


@lru_cache(maxsize=4096)
def flat_plan(elements: int, itemsize: int) -> Plan:
    """For a pass in which nothing depends on rows or channels: one row of all elements."""
    (tile,) = flat_tiles(itemsize)
    steps = _ceil_div(elements + tile.vector - 1, tile.columns)
    return _cut(1, elements, tile, _ceil_div(steps, 16 * PROGRAMS), 1)


@cache
def flat_tiles(itemsize: int) -> list[Tile]:
    """The tile of :func:`flat_plan`."""
    vector = 16 // itemsize
    return [Tile(1, 512 * vector, vector, shifted=True)]


# ---- the backward of *_dreg and *_tangent ----------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def backward_plan(rows: int, columns: int, itemsize: int, sums: bool) -> Plan:
    """For a backward without anything that belongs to a channel.

    Args:
        rows: samples.
        columns: channels.
        itemsize: of an element, in bytes.
        sums: whether every program leaves a sum for each coefficient.
    """
    vector, shifted = _vector_and_shift(columns, itemsize)
    tile = _choose(_tiles_of_two_vectors(vector, shifted), rows, columns, PROGRAMS)
    return _shared(rows, columns, tile, 2 * PROGRAMS if sums else 16 * PROGRAMS)


def _shared(rows: int, columns: int, tile: Tile, programs: int) -> Plan:
    """At least about ``programs`` programs of equal work: runs of rows, or parts of rows where there are few."""
    blocks = max(1, _ceil_div(rows, tile.rows))
    steps = max(1, _ceil_div(columns + tile.vector - 1, tile.columns))
    tiles = min(_ceil_div(steps * blocks, programs), ADDITIONS)
    return _cut(rows, columns, tile, min(steps, tiles), tiles // steps)


@cache
def backward_tiles(itemsize: int) -> list[Tile]:
    """Every tile that :func:`backward_plan` can choose."""
    return _with_and_without_shift(_tiles_of_two_vectors, itemsize)


@lru_cache(maxsize=4096)
def flat_backward_plan(elements: int, itemsize: int, sums: bool) -> Plan:
    """For a backward in which nothing depends on rows or channels."""
    (tile,) = flat_backward_tiles(itemsize)
    return _shared(1, elements, tile, 2 * PROGRAMS if sums else 16 * PROGRAMS)


@cache
def flat_backward_tiles(itemsize: int) -> list[Tile]:
    """The tile of :func:`flat_backward_plan`."""
    vector = 16 // itemsize
    return [Tile(1, 256 * vector, vector, shifted=True)]


# ---- coefficients, weights or sums for each channel: the forward of *_dreg, and the backward of both -----------------


@cache
def _channel_tiles(vector: int, itemsize: int, degree: int) -> dict[str, Tile]:
    # One vector for each thread, so that what belongs to a channel is in registers once: a warp for every row, or
    # several narrow rows for every warp. What a tile lacks in loads in flight, unrolling makes up for.
    whole = 16 // itemsize
    unroll = 4 if degree <= 4 else 2
    narrow = Tile(4 * whole, 32, vector, unroll=unroll) if vector > 1 else Tile(32, 8, vector, unroll=unroll)
    middle = Tile(4, 32 * whole if vector > 1 else 64, vector, unroll=unroll)
    return {"narrow": narrow, "middle": middle}


@lru_cache(maxsize=4096)
def channel_plan(rows: int, columns: int, itemsize: int, degree: int) -> Plan:
    """For coefficients, weights or sums for each channel: programs own columns and runs of rows.

    Args:
        rows: samples.
        columns: channels.
        itemsize: of an element, in bytes.
        degree: see :func:`channel_degree`; 0 for an activation.
    """
    vector = 1 if columns % (16 // itemsize) else 16 // itemsize
    tiles = _channel_tiles(vector, itemsize, degree)
    tile = tiles["narrow"] if columns <= NARROW_COLUMNS else tiles["middle"]
    blocks = max(1, _ceil_div(rows, tile.rows))
    steps = max(1, _ceil_div(columns, tile.columns))
    run = min(max(_ceil_div(ROWS_PER_SUM, tile.rows), _ceil_div(blocks * steps, PROGRAMS)), ADDITIONS)
    return _cut(rows, columns, tile, 1, _ceil_div(run, tile.unroll) * tile.unroll)


def channel_degree(kind: str, degree: int) -> int:
    """The degree by which the tiles are chosen: a rectified polynomial needs the registers of a higher one."""
    return max(degree, 5) if kind == "rectified_polynomial" else degree


@cache
def channel_tiles(itemsize: int, degree: int) -> list[Tile]:
    """Every tile that :func:`channel_plan` can choose."""
    return [tile for vector in (16 // itemsize, 1) for tile in _channel_tiles(vector, itemsize, degree).values()]


# ---- the forward of *_tangent ----------------------------------------------------------------------------------------


@cache
def _tangent_tiles(vector: int) -> dict[str, Tile]:
    if vector == 1:
        return {"narrow": Tile(64, 8, 1), "middle": Tile(4, 64, 1), "wide": Tile(1, 512, 1, registers=REGISTERS)}
    return _tiles_of_two_vectors(vector, False)


@cache
def _tangent_backward_tiles(vector: int) -> dict[str, Tile]:
    # One vector for each thread: slope, curvature and the sum over the tangents are kept beside what is loaded.
    if vector == 1:
        return _tangent_tiles(1)
    return {
        "narrow": Tile(4 * vector, 32, vector),
        "middle": Tile(vector // 2, 256, vector),
        "wide": Tile(1, 128 * vector, vector),
    }


@lru_cache(maxsize=4096)
def tangent_plan(rows: int, columns: int, itemsize: int) -> Plan:
    """For the tangent forward: one tile for each program, since the norms of all tangents have no room in registers.

    Args:
        rows: samples.
        columns: channels.
        itemsize: of an element, in bytes.
    """
    vector = 1 if columns % (16 // itemsize) else 16 // itemsize
    return _cut(rows, columns, _choose(_tangent_tiles(vector), rows, columns, PROGRAMS), 1, 1)


@lru_cache(maxsize=4096)
def tangent_backward_plan(rows: int, columns: int, itemsize: int, sums: bool) -> Plan:
    """For the tangent backward without anything that belongs to a channel; arguments as for :func:`backward_plan`."""
    vector = 1 if columns % (16 // itemsize) else 16 // itemsize
    tile = _choose(_tangent_backward_tiles(vector), rows, columns, PROGRAMS)
    return _shared(rows, columns, tile, 2 * PROGRAMS if sums else 16 * PROGRAMS)


@cache
def tangent_tiles(itemsize: int) -> list[Tile]:
    """Every tile that :func:`tangent_plan` can choose."""
    return [*_tangent_tiles(16 // itemsize).values(), *_tangent_tiles(1).values()]


@cache
def tangent_backward_tiles(itemsize: int) -> list[Tile]:
    """Every tile that :func:`tangent_backward_plan` can choose."""
    return [*_tangent_backward_tiles(16 // itemsize).values(), *_tangent_backward_tiles(1).values()]


# ---- a matrix product with the function in its epilogue --------------------------------------------------------------

FULL_PRODUCT_TILES = 128
TENSOR_CORE_BALANCE = 128
PRODUCT_EFFICIENCY = 0.8
DEGREE_PER_CHANNEL = 4


@dataclass(frozen=True, eq=False)
class ProductTile(Tile):
    """A tile of ``x Wᵀ``.

    Attributes:
        inner: elements of a row of ``x`` and of ``W`` that are multiplied in one step.
        stages: steps whose operands are in shared memory at once.
        slices: parts of the tile, side by side, that the epilogue goes through one after another.
        group: tiles above one another that follow each other.
    """

    inner: int = 32
    stages: int = 2
    slices: int = 8
    group: int = 8

    @property
    def name(self) -> str:
        """Short, for tables."""
        return f"{self.rows}x{self.columns}x{self.inner}"

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel is compiled with, by the name of its parameter."""
        return {**super().constants, "INNER": self.inner, "SLICES": self.slices, "GROUP": self.group}

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told beside the number of warps."""
        return {**super().options, "num_stages": self.stages}


@cache
def product_tiles(itemsize: int, architecture: str) -> list[ProductTile]:
    """The tiles of the product, for many rows and for few.

    Args:
        itemsize: of an element of ``x`` and ``W``, in bytes.
        architecture: ``"sm_90"``, ``"gfx942"``, …

    Shared memory decides: a step holds ``(rows + columns) · inner`` elements. Hopper and the datacentre Blackwell have
    227 KB for a program, Ampere 163 KB, the other GPUs since then 99 KB, CDNA 64 KB. Eight slices keep a tile's values
    and slopes in registers, beside its sums. [The figures are of shared memory and registers, not of times.]
    """
    row_bytes, stages = 64, 4
    if architecture in ("sm_90", "sm_100", "sm_103"):
        row_bytes, stages = 128, 4
    elif architecture.startswith("gfx"):
        row_bytes, stages = 128, 2
    vector, inner = 16 // itemsize, row_bytes // itemsize
    return [
        ProductTile(128, 128, vector, warps=8, inner=inner, stages=stages),
        ProductTile(64, 64, vector, warps=4, inner=inner, stages=stages, slices=4),
    ]


@lru_cache(maxsize=4096)
def product_plan(rows: int, columns: int, itemsize: int, architecture: str) -> Plan:
    """For ``x Wᵀ`` with ``rows`` samples and ``columns`` outputs: the large tile unless it would leave a GPU idle."""
    large, small = product_tiles(itemsize, architecture)
    enough = _ceil_div(rows, large.rows) * _ceil_div(columns, large.columns) >= FULL_PRODUCT_TILES
    tile = large if enough else small
    return Plan(tile, 1, _ceil_div(columns, tile.columns), 1, _ceil_div(rows, tile.rows))


def why_no_epilogue(
    columns: int, inner: int, itemsize: int, *, tensor_cores: bool, degree_per_channel: int, keeps_z: bool
) -> str | None:
    """Why a linear op runs as the library's product and one fused pass behind it; None for one kernel that does both.

    Args:
        columns: output features.
        inner: input features.
        itemsize: of an element, in bytes.
        tensor_cores: whether the product may run on them: half precision, or float32 where PyTorch allows TF32.
        degree_per_channel: of polynomials of the channels' own; 0 for anything else.
        keeps_z: whether ``z`` is written for the backward.

    The pass behind the product reads the ``z`` that the product has written: ``itemsize`` bytes for each element of
    ``z``; where no backward follows, the epilogue saves the write as well, so twice that. The price is the library's
    lead in the product itself, ``2 · inner`` operations for each element. With a product that runs at
    ``PRODUCT_EFFICIENCY`` of the library's speed, on a GPU that does ``TENSOR_CORE_BALANCE`` operations in half
    precision (half as many in TF32) in the time in which it moves a byte::

        2 · inner · (1 / PRODUCT_EFFICIENCY - 1)  <=  saved bytes · balance

    which is ``inner <= 512`` in training and ``inner <= 1024`` in inference. Both constants are assumptions, of the
    order of what is published for Triton on an A100 and an H100; neither has been measured with this kernel.
    """
    vector = 16 // itemsize
    if not tensor_cores:
        return "a product without tensor cores costs far more than the round trip of z"
    if inner % vector or columns % vector:
        return f"rows of x, weight and y must be multiples of 16 bytes, {vector} features"
    if degree_per_channel > DEGREE_PER_CHANNEL:
        return f"polynomials of the channels' own above degree {DEGREE_PER_CHANNEL} leave registers for no tile"
    saved = itemsize if keeps_z else 2 * itemsize
    balance = TENSOR_CORE_BALANCE * 2 / itemsize
    limit = int(saved * balance / (2 * (1 / PRODUCT_EFFICIENCY - 1)))
    if inner > limit:
        return f"with more than {limit} input features the library's faster product outweighs the round trip of z"
    return None

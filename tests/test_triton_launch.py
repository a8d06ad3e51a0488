"""How the Triton kernels cut their work: pure arithmetic, tested without Triton and without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chainzrule_kernels.ops import _launch
from chainzrule_kernels.ops._launch import Plan, Tile

WIDTHS = [
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    37,
    64,
    65,
    72,
    75,
    255,
    256,
    300,
    1000,
    1001,
    1024,
    2048,
    2049,
    4096,
    8191,
    65535,
    65536,
]
ROWS = [1, 2, 3, 15, 16, 100, 1023, 4096, 65536, 1 << 20, 1 << 31]
ITEMSIZES = [2, 4, 8]

PLANS: dict[str, tuple[Callable[[int, int, int], Plan], Callable[[int], list[Tile]]]] = {
    "forward": (_launch.forward_plan, _launch.forward_tiles),
    "flat": (lambda rows, columns, size: _launch.flat_plan(rows * columns, size), _launch.flat_tiles),
    "backward, sums": (lambda *shape: _launch.backward_plan(*shape, True), _launch.backward_tiles),
    "backward": (lambda *shape: _launch.backward_plan(*shape, False), _launch.backward_tiles),
    "flat backward": (
        lambda rows, columns, size: _launch.flat_backward_plan(rows * columns, size, True),
        _launch.flat_backward_tiles,
    ),
    "channel, degree 3": (lambda *shape: _launch.channel_plan(*shape, 3), lambda size: _launch.channel_tiles(size, 3)),
    "channel, degree 8": (lambda *shape: _launch.channel_plan(*shape, 8), lambda size: _launch.channel_tiles(size, 8)),
    "tangent": (_launch.tangent_plan, _launch.tangent_tiles),
    "tangent backward": (lambda *shape: _launch.tangent_backward_plan(*shape, True), _launch.tangent_backward_tiles),
}


def matrix(name: str, rows: int, columns: int) -> tuple[int, int]:
    """The matrix that the kernel sees."""
    return (1, rows * columns) if name.startswith("flat") else (rows, columns)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("name", PLANS)
def test_r14_a_new_shape_brings_no_new_tile(name: str, itemsize: int) -> None:
    plan, tiles = PLANS[name]
    known = tiles(itemsize)
    chosen = {plan(rows, columns, itemsize).tile for rows in ROWS for columns in WIDTHS}
    assert chosen <= set(known)
    # Every tile is there for a reason.
    assert chosen == set(known)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("name", PLANS)
def test_programs_cover_the_matrix_once(name: str, itemsize: int) -> None:
    plan_of, _ = PLANS[name]
    for rows in ROWS:
        for columns in WIDTHS:
            plan = plan_of(rows, columns, itemsize)
            tile = plan.tile
            m, n = matrix(name, rows, columns)
            # A shifted row may begin up to a vector before its first element.
            reach = n + (tile.vector - 1 if tile.shifted else 0)
            for parts, each, size, extent in (
                (plan.splits, plan.steps_per_split, tile.columns, reach),
                (plan.row_programs, plan.blocks_per_program, tile.rows, m),
            ):
                assert (parts - 1) * each * size < extent <= parts * each * size
            # The grid's limit, for every tensor that fits the largest memory by far.
            assert plan.programs < 1 << 31 or rows * columns > 1 << 38
            if not tile.shifted:
                assert n % tile.vector == 0
            elif not name.startswith("flat"):
                assert n >= tile.vector


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("name", [name for name in PLANS if name != "flat"])
def test_no_sum_in_a_register_has_many_terms(name: str, itemsize: int) -> None:
    plan_of, _ = PLANS[name]
    for rows in ROWS:
        for columns in [*WIDTHS, 1 << 22, 1 << 30]:
            plan = plan_of(rows, columns, itemsize)
            # A forward adds over the columns only.
            blocks = 1 if name == "forward" else plan.blocks_per_program
            assert plan.steps_per_split * blocks <= _launch.ADDITIONS


@pytest.mark.parametrize("columns", [1, 8, 64, 65, 1000, 4096, 4097])
def test_a_small_call_has_no_second_stage(columns: int) -> None:
    for rows in (1, 2, 64):
        assert _launch.forward_plan(rows, columns, 2).splits == 1


def test_tiles_loaded_together_belong_to_one_program() -> None:
    for rows in ROWS:
        for columns in WIDTHS:
            plan = _launch.channel_plan(rows, columns, 2, 3)
            assert plan.row_programs == 1 or plan.blocks_per_program % plan.tile.unroll == 0


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "shape", [(1 << 26, 1), (1 << 23, 8), (1 << 20, 64), (65536, 1024), (1024, 65536), (16, 1 << 22)]
)
def test_large_tensors_fill_a_gpu(name: str, shape: tuple[int, int]) -> None:
    # Two programs for each of the 132 multiprocessors of an H200, whatever the shape of 64 Mi elements.
    assert PLANS[name][0](*shape, 2).programs >= 264


@pytest.mark.parametrize("name", ["backward, sums", "flat backward", "channel, degree 3", "tangent backward"])
def test_partial_sums_are_few(name: str) -> None:
    for shape in [(65536, 1024), (1024, 65536), (1 << 20, 64)]:
        plan = PLANS[name][0](*shape, 2)
        # Four coefficients, and row_sq, in float32; two tensors read and one written in half precision.
        per_program = 4 * (4 if "channel" not in name else 5 * plan.tile.columns)
        assert plan.programs * per_program <= 0.06 * 3 * 2 * shape[0] * shape[1]

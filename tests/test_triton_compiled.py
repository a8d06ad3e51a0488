"""The Triton kernels compiled for GPUs that are not here: no spills, no atomics, no float64, wide loads and stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from chainzrule_kernels import inspection
from chainzrule_kernels.cli import main
from chainzrule_kernels.inspection import Variant

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def _variants(dtype: str, arch: str = "sm_90", *, quick: bool) -> list[Variant]:
    return list(inspection.variants(inspection.itemsize(dtype), arch, quick=quick))


def _check(variant: Variant, arch: str, dtype: str) -> None:
    found = inspection.inspect(variant, arch, dtype)
    assert found.spills == 0
    assert found.atomics == 0
    assert found.float64 == 0
    # Rows that are neither a whole number of vectors nor free of anything per channel go one element at a time.
    wide = 16 if variant.tile.vector > 1 else inspection.itemsize(dtype)
    assert found.load_bytes >= wide
    # A product leaves the matrix cores of AMD with four elements of a row in a thread, and is stored like that.
    assert found.store_bytes >= (
        4 * inspection.itemsize(dtype) if arch == "gfx942" and "linear" in variant.kernel else wide
    )


# In groups, so that a process of pytest-xdist does not pay for a report of each.
GROUPS = sorted({variant.kernel for variant in _variants("bfloat16", quick=False)})


@pytest.mark.parametrize("kernel", GROUPS)
def test_compiled_for_hopper(kernel: str) -> None:
    for variant in _variants("bfloat16", quick=False):
        if variant.kernel == kernel:
            _check(variant, "sm_90", "bfloat16")


@pytest.mark.parametrize("kernel", GROUPS)
def test_compiled_for_hopper_in_float32(kernel: str) -> None:
    for variant in _variants("float32", quick=True):
        if variant.kernel == kernel and variant.tile.vector > 1:
            _check(variant, "sm_90", "float32")


@pytest.mark.parametrize("kernel", GROUPS)
def test_compiled_for_ampere(kernel: str) -> None:
    for variant in _variants("bfloat16", "sm_80", quick=True):
        if variant.kernel == kernel and variant.tile.vector > 1:
            _check(variant, "sm_80", "bfloat16")


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_architectures_are_read(arch: str) -> None:
    for kernel in GROUPS:
        variants = (item for item in _variants("bfloat16", arch, quick=True) if item.kernel == kernel)
        _check(next(item for item in variants if item.tile.vector > 1 and not item.tile.shifted), arch, "bfloat16")


def test_shared_coefficients_move_whole_vectors_whatever_the_length() -> None:
    """With nothing per channel there are 16-byte tiles for every width from 65 on; without rows, for every length."""
    from chainzrule_kernels.ops import _launch

    for itemsize in (2, 4):
        for columns in range(_launch.SHIFTED_COLUMNS, 400):
            for rows in (1, 100_000):
                assert _launch.forward_plan(rows, columns, itemsize).tile.vector * itemsize == 16
                assert _launch.backward_plan(rows, columns, itemsize, True).tile.vector * itemsize == 16
        for length in range(1, 100):
            assert _launch.flat_plan(length, itemsize).tile.vector * itemsize == 16
            assert _launch.flat_backward_plan(length, itemsize, True).tile.vector * itemsize == 16


def test_inspect_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--arch", "sm_90", "--dtype", "bfloat16", "--kernel", "norm", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "registers" in printed
    assert "dreg_forward[degree 3" in printed


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--arch", "sm_90", "--dtype", "bfloat16", "--kernel", "norm", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == len([it for it in _variants("bfloat16", quick=True) if "norm" in it.name])
    assert set(found[0]) == {
        "kernel",
        "arch",
        "dtype",
        "registers",
        "spills",
        "shared_bytes",
        "load_bytes",
        "store_bytes",
        "atomics",
        "float64",
    }
    assert 0 < found[0]["registers"] <= 255


@pytest.mark.parametrize("arguments", [["--arch", "volta"], ["--dtype", "int8"]])
def test_inspect_refuses_what_it_does_not_know(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    assert "expected" in capsys.readouterr().err


class _AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def absent_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a kernel be compiled through its usual entry, as the first call on a GPU would."""
    from triton.runtime import driver

    from chainzrule_kernels.ops import _dreg_kernels_triton

    caches = _dreg_kernels_triton.dreg_forward_kernel.device_caches
    caches.clear()
    monkeypatch.setattr(driver, "_active", _AbsentGPU())
    yield
    caches.clear()


@pytest.mark.usefixtures("absent_gpu")
def test_r14_a_new_shape_compiles_nothing() -> None:
    from chainzrule_kernels.ops import _call_triton, _dreg_triton, _launch

    kernel = _dreg_triton.dreg_forward_kernel
    tiles = _launch.forward_tiles(4)

    def compiled() -> int:
        return len(kernel.device_caches[0][0])

    def warm(rows: int, columns: int) -> None:
        z, coeffs, norm = torch.empty(1, 64), torch.empty(4), torch.empty(16)
        plan = _launch.forward_plan(rows, columns, 4)
        arguments = (z, coeffs, z, None, norm, rows, columns, plan.steps_per_split, plan.splits)
        _call_triton.compile_for(kernel, [plan.tile], arguments, {"KIND": "polynomial", "DEGREE": 3})

    before = compiled()
    z = torch.empty(1, 64)
    arguments = (z, torch.empty(4), z, None, torch.empty(16), 1, 64, 1, 1)
    _call_triton.compile_for(kernel, tiles, arguments, {"KIND": "polynomial", "DEGREE": 3})
    assert compiled() == before + len(tiles)
    # Sizes that are 1, that are multiples of 16, and that need 64 bits are not special.
    for rows, columns in [(1, 1), (16, 16), (70, 37), (5000, 300), (5000, 303), (3, 4099), (1 << 33, 8), (1, 1 << 33)]:
        warm(rows, columns)
    assert compiled() == before + len(tiles)

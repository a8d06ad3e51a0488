"""The Triton kernels compiled for GPUs that are not here: no spills, no atomics, no float64, wide loads and stores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from chainzrule_kernels import inspection
from chainzrule_kernels.cli import main
from chainzrule_kernels.inspection import Variant
from chainzrule_kernels.ops import _launch
from chainzrule_kernels.ops._launch import Tile

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
        if variant.kernel == kernel and (variant.tile.vector > 1 or kernel == "tangent_forward_kernel"):
            _check(variant, "sm_80", "bfloat16")


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_architectures_are_read(arch: str) -> None:
    for kernel in GROUPS:
        variants = (item for item in _variants("bfloat16", arch, quick=True) if item.kernel == kernel)
        _check(next(item for item in variants if item.tile.vector > 1 and not item.tile.shifted), arch, "bfloat16")


def test_shared_coefficients_move_whole_vectors_whatever_the_length() -> None:
    """With nothing per channel there are 16-byte tiles for every width from 65 on; without rows, for every length."""
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
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Lets the ops on Triton kernels run but for the launch, and tells how many kernels they have compiled."""
    from triton.compiler import CompiledKernel
    from triton.runtime import JITFunction, driver

    from chainzrule_kernels.ops import (
        _call_triton,
        _dreg_kernels_triton,
        _linear_kernels_triton,
        _tangent_kernels_triton,
    )

    def launcher(kernel: CompiledKernel, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: None

    modules = (_dreg_kernels_triton, _linear_kernels_triton, _tangent_kernels_triton)
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    caches = [kernel.device_caches for kernel in kernels if kernel.__name__.endswith("_kernel")]
    for cache in caches:
        cache.clear()
    monkeypatch.setattr(driver, "_active", _AbsentGPU())
    monkeypatch.setattr(CompiledKernel, "__getitem__", launcher)
    monkeypatch.setattr(_call_triton, "COMPILE_AHEAD", True)
    monkeypatch.setattr(_call_triton, "_compiled", {})
    yield lambda: sum(len(of_device[0]) for cache in caches for of_device in cache.values())
    for cache in caches:
        cache.clear()


def _dreg(z: Tensor, *, per_channel: bool) -> None:
    """Forward and backward of polynomial_dreg, without a launch."""
    from chainzrule_kernels.ops import _dreg_triton

    columns = z.shape[1]
    coeffs = z.new_empty((4, columns) if per_channel else (4,), dtype=torch.float32)
    row_sq = z.new_empty(columns, dtype=torch.float32) if per_channel else None
    y, norm, _ = _dreg_triton.polynomial_dreg(z, row_sq, coeffs, False, False)
    _dreg_triton.polynomial_dreg_backward(z, row_sq, coeffs, y, norm, None, False, True, per_channel, True)


def _tangents(z: Tensor) -> None:
    from chainzrule_kernels.ops import _tangent_triton

    coeffs, z_dot = z.new_empty((4, z.shape[1]), dtype=torch.float32), z.new_empty(2, *z.shape)
    y, y_dot, norm = _tangent_triton.polynomial_tangent(z, z_dot, coeffs, False)
    _tangent_triton.polynomial_tangent_backward(z, z_dot, coeffs, y, y_dot, norm, False, True, True, True)


def _product(z: Tensor) -> None:
    """A product with as many rows and columns, each a whole number of vectors, and more or fewer input features."""
    from chainzrule_kernels.ops import _linear_triton

    rows, columns = z.shape[0], -(-z.shape[1] // 8) * 8
    for inner in (8, 16, 72, 512):
        x, weight, row_sq = z.new_empty(rows, inner), z.new_empty(columns, inner), z.new_empty(columns).float()
        _linear_triton.linear_polynomial_dreg(
            x, weight, z.new_empty(columns), row_sq, z.new_empty(4).float(), keep_z=True
        )


@pytest.mark.parametrize(
    ("run", "tiles"),
    [
        (partial(_dreg, per_channel=False), [_launch.forward_tiles(2), _launch.backward_tiles(2)]),
        (partial(_dreg, per_channel=True), [_launch.channel_tiles(2, 3), _launch.channel_tiles(2, 3)]),
        (_tangents, [_launch.tangent_tiles(2), _launch.channel_tiles(2, 3)]),
        (_product, [_launch.product_tiles(2, "sm_90")]),
    ],
    ids=["shared", "per channel", "tangents", "product"],
)
def test_r14_a_new_shape_compiles_nothing(
    run: Callable[[Tensor], None], tiles: list[list[Tile]], compiled: Callable[[], int]
) -> None:
    # Tensors without memory, so that they may be of any size. Sizes that are 1, that are multiples of 16, and that need
    # 64 bits are not special.
    shapes = [(4, 8), (1, 1), (16, 16), (70, 37), (5000, 300), (5000, 303), (3, 4099), (1 << 33, 8), (1, 1 << 33)]
    for shape in shapes:
        run(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        assert compiled() == sum(map(len, tiles)), shape


def test_the_gradient_of_a_norm_may_begin_anywhere(compiled: Callable[[], int]) -> None:
    """It may be a part of a larger tensor, and is used where it lies; everything else is aligned, or copied."""
    from chainzrule_kernels.ops import _call_triton, _dreg_triton

    z, coeffs = torch.empty(3, 8), torch.empty(4)
    for grad in (torch.empty(3), torch.empty(4)[1:], torch.empty(4)[1].expand(3)):
        _dreg_triton.polynomial_dreg_backward(z, None, coeffs, z, grad, None, False, True, False, True)
    assert compiled() == len(_launch.backward_tiles(4))
    for for_tiles in _call_triton._compiled.values():
        for kernel, _ in for_tiles.values():
            aligned = {kernel.src.fn.arg_names[index] for (index,), known in kernel.src.attrs.items() if known}
            assert aligned == {
                "z_pointer",
                "coeffs_pointer",
                "grad_y_pointer",
                "grad_z_pointer",
                "coefficient_sums_pointer",
            }


def test_on_amd_triton_sees_how_large_a_tensor_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it compiles 32-bit addresses where they suffice: what was compiled for one size may not serve another."""
    from triton.runtime import JITFunction

    from chainzrule_kernels.ops import _call_triton, _dreg_triton

    launched = []

    def run(kernel: Any, *arguments: Any, warmup: bool, **named: Any) -> None:
        if not warmup:
            launched.append(arguments[0])

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(_call_triton, "_compiled", {})
    for rows in (4, 1 << 33):
        z = torch.empty(rows, 8, device="meta")
        _dreg_triton.polynomial(z, torch.empty(4, device="meta"), False)
        assert launched.pop() is z

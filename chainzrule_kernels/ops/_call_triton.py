"""From tensors to a launch: what the operators on the Triton kernels have in common."""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from chainzrule_kernels.ops._launch import Plan, Tile

_VECTOR_BYTES = 16
# For a kernel with its device, dtypes and constants: what to launch for each tile, and the constants behind the sizes.
_Compiled = dict[Tile, tuple[Any, tuple[Any, ...]]]
_compiled: dict[tuple[Any, ...], _Compiled] = {}

COMPILE_AHEAD = os.environ.get("CHAINZRULE_KERNELS_COMPILE_AHEAD", "1") not in ("", "0")
"""Whether the first call of a kernel compiles it for all its tiles, or every tile is compiled when it is first needed.

Ahead is for programs that run long with shapes that vary. A test suite, with a few calls of a thousand kernels, is
better off without.
"""


def contiguous(tensor: Tensor | None) -> Any:
    """The tensor, copied unless it lies row after row and begins where a 16-byte load may begin; None stays None.

    So a kernel is compiled for one layout only.
    """
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _VECTOR_BYTES == 0 else tensor.clone()


def per_sample(tensor: Tensor | None) -> tuple[Any, int]:
    """One number for each row, and the distance between two of them.

    The gradient of a mean over the batch is one number, expanded; it is used where it lies.
    """
    if tensor is None:
        return None, 0
    if tensor.numel() > 1 and not any(tensor.stride()):
        return tensor, 0
    return tensor.contiguous(), 1


def rows_and_columns(tensor: Tensor) -> tuple[int, int]:
    """``(..., N)`` with at least one element, as a matrix."""
    columns = tensor.shape[-1]
    return tensor.numel() // columns, columns


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised, contiguous, of the same shape and dtype."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def polynomial_kind(rectified: bool) -> str:
    """The ``KIND`` of a kernel for ``p(z)``, or for ``p(relu(z))``."""
    return "rectified_polynomial" if rectified else "polynomial"


def nothing(tensor: Tensor) -> Tensor:
    """A result that is not wanted."""
    return tensor.new_empty(0)


def added_up(sums: Tensor | None, parameter: Tensor | None) -> Tensor:
    """The second stage: the programs' sums, added in a fixed order in float64, as the gradient of ``parameter``."""
    assert parameter is not None
    if sums is None:
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    return sums.sum(0, dtype=torch.float64).to(parameter.dtype)


def launch(
    kernel: Any,
    plan: Plan,
    tiles: Sequence[Tile],
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    constants: dict[str, Any],
) -> None:
    """Run a kernel on the current stream of the first tensor's device.

    Triton would look up at every call what it has compiled, by the type, alignment and value of every argument, which
    costs the host more than the launch. Here dtypes, constants and tile say all: tensors begin on 16-byte boundaries
    (:func:`contiguous`, or fresh from the allocator), and sizes are not special.

    Args:
        kernel: the Triton function.
        plan: how the call is cut.
        tiles: every tile that another shape may ask for. The first call of a kernel with these dtypes and constants
            compiles it for all of them, so that no later shape compiles anything.
        tensors: its first arguments; None for an absent one.
        sizes: the integer arguments behind them.
        constants: what is compiled in beside the tile.
    """
    device = tensors[0].device  # type: ignore[union-attr]
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, plan, tiles, tensors, sizes, constants)
        return
    if not isinstance(kernel, triton.JITFunction):  # the interpreter's
        kernel[(plan.programs,)](*tensors, *sizes, **constants, **of_tile(kernel, plan.tile))
        return
    # The function, since Triton hashes a kernel by its source.
    key = (kernel.fn, device, *[value if value is None else value.dtype for value in tensors], *constants.values())
    for_tiles = _compiled.setdefault(key, {})
    if plan.tile not in for_tiles:
        for tile in tiles if COMPILE_AHEAD else (plan.tile,):
            for_tiles[tile] = _compiled_for(kernel, tile, (*tensors, *sizes), constants)
    if torch.version.hip:
        # Compiled apart are tensors that 32 bits can address, and larger ones. Triton sees which these are.
        kernel[(plan.programs,)](*tensors, *sizes, **constants, **of_tile(kernel, plan.tile))
        return
    compiled, behind = for_tiles[plan.tile]
    compiled[plan.programs, 1, 1](*tensors, *sizes, *behind)


def _compiled_for(
    kernel: Any, tile: Tile, arguments: Sequence[Any], constants: dict[str, Any]
) -> tuple[Any, tuple[Any, ...]]:
    """The kernel for a tile, not run, and the values of its parameters behind ``arguments``."""
    given = {**constants, **of_tile(kernel, tile)}
    compiled = kernel.warmup(*arguments, **given, grid=(1,))
    return compiled, tuple(given[name] for name in kernel.arg_names[len(arguments) :])


def of_tile(kernel: Any, tile: Tile, lanes: int = 64 if torch.version.hip else 32) -> dict[str, Any]:
    """What a kernel is given of a tile, and how it is compiled.

    Args:
        kernel: the Triton function.
        tile: the tile.
        lanes: threads of a warp: 64 on the AMD GPUs in question. A program has as many threads everywhere, except that
            on AMD a shifted tile has twice as many: its masks are in scalar registers, of which there are few.
    """
    taken = {name: value for name, value in tile.constants.items() if name in kernel.arg_names}
    options = tile.options
    warps = tile.warps * 32 // lanes
    if lanes == 64:
        options.pop("maxnreg", None)
        warps *= 2 if tile.shifted else 1
    return {**taken, "num_warps": warps, "enable_fp_fusion": True, **options}


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """What the device is called by :func:`chainzrule_kernels.inspection.inspect`; in the interpreter an ``sm_80``."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

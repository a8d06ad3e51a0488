"""What the compiler makes of the Triton kernels, for GPUs that need not be there.

A kernel is compiled with Triton's own compiler and assembler for an architecture, and the result is read: registers,
spills and shared memory from the machine code, the width of every global load and store from the assembly (PTX; for
AMD the LLVM code behind it), where each address can be followed back to the tensor it came from.

Only tensors that are as large as the data matter for the width: those are *streamed*. Of a matrix that is not a whole
number of vectors, the last elements are moved one by one (:mod:`chainzrule_kernels.ops._launch`, *shifted*); those few
instructions are set aside, and what is reported is the narrowest of the others.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chainzrule_kernels.functions import ACTIVATION_KINDS, MAX_DEGREE
from chainzrule_kernels.ops import _launch
from chainzrule_kernels.ops._launch import Tile

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Those that are looked at by default; others of the form ``sm_*`` and ``gfx*`` may be asked for."""

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
"""Data types, and what Triton calls them."""

_ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_STREAMED = frozenset(
    f"{name}_pointer"
    for name in (
        "z",
        "y",
        "derivative",
        "grad_y",
        "grad_derivative",
        "grad_z",
        "z_dot",
        "y_dot",
        "grad_y_dot",
        "grad_z_dot",
        "x",
        "weight",
    )
)
_OF_THE_DATA_DTYPE = _STREAMED | {"bias_pointer"}


@dataclass(frozen=True)
class Variant:
    """One form in which a kernel is compiled.

    Attributes:
        kernel: the name of the function.
        kind: ``"polynomial"``, ``"rectified_polynomial"`` or an activation.
        degree: of the polynomial; 0 for an activation.
        per_channel: whether there are coefficients for each channel.
        tile: what is compiled in of the launch.
        absent: the pointers that are null, without ``_pointer``.
    """

    kernel: str
    kind: str
    degree: int
    per_channel: bool
    tile: Tile
    absent: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique in :func:`variants`."""
        function = self.kind if self.degree == 0 else f"degree {self.degree}"
        if self.kind == "rectified_polynomial":
            function = f"rectified, {function}"
        parts = [function, "per channel"] if self.per_channel else [function]
        parts.append(self.tile.name)
        parts += [f"no {name}" for name in self.absent]
        return f"{self.kernel.removesuffix('_kernel')}[{', '.join(parts)}]"


@dataclass(frozen=True)
class Inspection:
    """What was found in one compiled kernel.

    Attributes:
        kernel: the variant's name.
        arch: the architecture.
        dtype: of the data.
        registers: of a thread.
        spills: instructions that move registers to local memory and back (for AMD, registers that are spilled).
        shared_bytes: shared memory of a program.
        load_bytes: the narrowest load of a streamed tensor, the tail of a shifted matrix aside.
        store_bytes: the narrowest store, likewise.
        atomics: atomic instructions on global memory.
        float64: instructions that compute in float64.
    """

    kernel: str
    arch: str
    dtype: str
    registers: int
    spills: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int
    atomics: int
    float64: int

    def as_json(self) -> dict[str, Any]:
        """For ``inspect --json``."""
        return asdict(self)


def itemsize(dtype: str) -> int:
    """Bytes of an element.

    Raises:
        ValueError: for a dtype that is not in :data:`DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return _ITEMSIZES[dtype]


def variants(itemsize: int, arch: str, *, quick: bool = False) -> Iterator[Variant]:
    """The kernels that are looked at: every kernel with every tile that its plans can choose.

    The cubic with all tiles; the highest degree, the rectified cubic and every activation with the ``middle`` tile,
    where registers are scarcest. All gradients arrive and all are wanted, except that ``derivative`` is an output
    rarely asked for and has one variant.

    Args:
        itemsize: of the data, in bytes; it decides the tiles.
        arch: the architecture; it decides those of the matrix product.
        quick: only the cubic.
    """
    if itemsize < 8:
        yield from _products(itemsize, arch, quick)
    degrees = (3,) if quick else (3, MAX_DEGREE)
    no_derivative = ("derivative",)
    no_grad_derivative = ("grad_derivative",)
    for degree in degrees:
        polynomial = ("polynomial", degree)
        shared, per_channel = (*polynomial, False), (*polynomial, True)
        channel_tiles = _launch.channel_tiles(itemsize, degree)
        for tile in _launch.flat_tiles(itemsize):
            yield Variant("dreg_forward_kernel", *shared, tile, ("derivative", "norm"))
        for tile in _some(_launch.forward_tiles(itemsize), degree):
            yield Variant("dreg_forward_kernel", *shared, tile, no_derivative)
        for tile in _some(channel_tiles, degree):
            yield Variant("dreg_channel_forward_kernel", *per_channel, tile, no_derivative)
        for tile in _launch.flat_backward_tiles(itemsize):
            yield Variant("dreg_backward_kernel", *shared, tile, ("grad_norm", *no_grad_derivative))
        for tile in _some(_launch.backward_tiles(itemsize), degree):
            yield Variant("dreg_backward_kernel", *shared, tile, no_grad_derivative)
        for tile in _some(channel_tiles, degree):
            yield Variant("dreg_channel_backward_kernel", *per_channel, tile, no_grad_derivative)
            yield Variant("dreg_channel_backward_kernel", *shared, tile, no_grad_derivative)
        for tile in _some(_launch.tangent_tiles(itemsize), degree):
            yield Variant("tangent_forward_kernel", *shared, tile)
            yield Variant("tangent_forward_kernel", *per_channel, tile)
        for tile in _some(_launch.tangent_backward_tiles(itemsize), degree):
            yield Variant("tangent_backward_kernel", *shared, tile)
        for tile in _some(channel_tiles, degree):
            yield Variant("tangent_backward_kernel", *per_channel, tile)
    if quick:
        return
    forward, backward = _launch.forward_tiles(itemsize)[1], _launch.backward_tiles(itemsize)[1]
    of_activation = _launch.forward_tiles(itemsize, True)[1]
    channel, tangent = _launch.channel_tiles(itemsize, 0)[1], _launch.tangent_backward_tiles(itemsize)[1]
    yield Variant("dreg_forward_kernel", "polynomial", 3, False, forward)
    yield Variant("dreg_backward_kernel", "polynomial", 3, False, backward)
    yield from _rectified(itemsize)
    for kind in ACTIVATION_KINDS:
        function = (kind, 0, False)
        no_sums = ("coeffs", "coefficient_sums")
        yield Variant("dreg_forward_kernel", *function, of_activation, ("coeffs", *no_derivative))
        yield Variant("dreg_backward_kernel", *function, backward, (*no_sums, *no_grad_derivative))
        yield Variant("dreg_channel_backward_kernel", *function, channel, (*no_sums, *no_grad_derivative))
        yield Variant("tangent_backward_kernel", *function, tangent, no_sums)


def _rectified(itemsize: int) -> Iterator[Variant]:
    kind, degree = "rectified_polynomial", 3
    flat, flat_backward = _launch.flat_tiles(itemsize)[0], _launch.flat_backward_tiles(itemsize)[0]
    forward, backward = _launch.forward_tiles(itemsize)[1], _launch.backward_tiles(itemsize)[1]
    channel = _launch.channel_tiles(itemsize, _launch.channel_degree(kind, degree))[1]
    tangent = _launch.tangent_backward_tiles(itemsize)[1]
    yield Variant("dreg_forward_kernel", kind, degree, False, flat, ("derivative", "norm"))
    yield Variant("dreg_forward_kernel", kind, degree, False, forward, ("derivative",))
    yield Variant("dreg_channel_forward_kernel", kind, degree, True, channel, ("derivative",))
    yield Variant("dreg_backward_kernel", kind, degree, False, flat_backward, ("grad_norm", "grad_derivative"))
    yield Variant("dreg_backward_kernel", kind, degree, False, backward, ("grad_derivative",))
    yield Variant("dreg_channel_backward_kernel", kind, degree, True, channel, ("grad_derivative",))
    yield Variant("tangent_backward_kernel", kind, degree, False, tangent)


def _products(itemsize: int, arch: str, quick: bool) -> Iterator[Variant]:
    """The products that :func:`chainzrule_kernels.ops._launch.why_no_epilogue` lets through."""
    large, small = _launch.product_tiles(itemsize, arch)
    for tile in (large, small):
        yield Variant("linear_dreg_kernel", "polynomial", 3, False, tile)
    if quick:
        return
    yield Variant("linear_dreg_kernel", "polynomial", 3, False, large, ("z",))
    yield Variant("linear_dreg_kernel", "polynomial", MAX_DEGREE, False, large)
    yield Variant("linear_dreg_kernel", "polynomial", _launch.DEGREE_PER_CHANNEL, True, large)
    for kind in ACTIVATION_KINDS:
        yield Variant("linear_dreg_kernel", kind, 0, False, large, ("coeffs",))


def _some(tiles: list[Tile], degree: int) -> list[Tile]:
    return tiles if degree == 3 else [tile for tile in tiles if tile.vector > 1 and not tile.shifted]


def inspect(variant: Variant, arch: str, dtype: str) -> Inspection:
    """Compile a variant for an architecture and read the result.

    Args:
        variant: one of :func:`variants` for this dtype's itemsize and this architecture.
        arch: ``"sm_90"``, ``"gfx942"``, …
        dtype: one of :data:`DTYPES`.

    Raises:
        ImportError: without Triton.
        ValueError: for an architecture or dtype of another form.
    """
    compiled, pointers = compile_for(variant, arch, dtype)
    widths = _ptx_accesses(compiled.asm["ptx"]) if "ptx" in compiled.asm else _llvm_accesses(compiled.asm["llir"])
    read = _read_nvidia(compiled) if "cubin" in compiled.asm else _read_amd(compiled)
    element = itemsize(dtype)
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    # What every thread moves of a tile, if it moves it in vectors.
    in_vectors = variant.tile.rows * variant.tile.columns * element // threads

    def narrowest(access: str) -> int:
        """The narrowest access to a streamed tensor, but for the tail of a shifted matrix."""
        found = set()
        for index, name in enumerate(pointers):
            if name in _STREAMED:
                counted = Counter(widths[access, index])
                wide = sum(width * count for width, count in counted.items() if width > element)
                if variant.tile.shifted and wide >= in_vectors:
                    del counted[element]
                found |= set(counted)
        return min(found, default=0)

    return Inspection(variant.name, arch, dtype, **read, load_bytes=narrowest("load"), store_bytes=narrowest("store"))


def compile_for(variant: Variant, arch: str, dtype: str) -> tuple[Any, list[str]]:
    """Triton's compiled kernel, and the names of the pointers and sizes that it takes, in order."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from chainzrule_kernels.ops import _dreg_kernels_triton, _linear_kernels_triton, _tangent_kernels_triton
    from chainzrule_kernels.ops._call_triton import of_tile

    if re.fullmatch(r"sm_\d+", arch):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    elif re.fullmatch(r"gfx9\w+", arch):
        target = GPUTarget("hip", arch, 64)
    else:
        raise ValueError(f"arch: expected sm_<number> or gfx9<letters and digits>, got {arch!r}")
    itemsize(dtype)
    data = DTYPES[dtype]
    modules = {"dreg": _dreg_kernels_triton, "linear": _linear_kernels_triton, "tangent": _tangent_kernels_triton}
    kernel = getattr(modules[variant.kernel.split("_")[0]], variant.kernel)
    given = of_tile(kernel, variant.tile, target.warp_size)
    given |= {"KIND": variant.kind, "DEGREE": variant.degree, "PER_CHANNEL": variant.per_channel}
    given["PRECISION"] = "tf32" if data == "fp32" else "ieee"
    signature, constants, attributes, taken = {}, {}, {}, []
    for index, name in enumerate(kernel.arg_names):
        if name in given or name.removesuffix("_pointer") in variant.absent:
            signature[name] = "constexpr"
            constants[name] = given.get(name)
            continue
        taken.append(name)
        if name.endswith("_pointer"):
            other = "fp64" if data == "fp64" else "fp32"
            signature[name] = f"*{data if name in _OF_THE_DATA_DTYPE else other}"
            if not kernel.params[index].do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in given.items() if name.islower()}
    return triton.compile(source, target=target, options=options), taken


# ---- reading -------------------------------------------------------------------------------------------------------


def _read_nvidia(compiled: Any) -> dict[str, int]:
    """Registers and spills from the machine code, with the tools in Triton's package."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _output_of(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        assembly = _output_of(knobs.nvidia.nvdisasm.path, "-c", str(path))
    registers = re.search(r"\bREG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump did not say how many registers are used: {usage}")
    return {
        "registers": int(registers[1]),
        "spills": _count(r"\b(?:LDL|STL)\b", assembly),
        "shared_bytes": int(compiled.metadata.shared),
        "atomics": _count(r"\b(?:ATOM|ATOMG|RED|REDG)\b", assembly),
        "float64": _count(r"\b(?:DADD|DMUL|DFMA|DSETP|DMNMX)\b|\b[A-Z0-9.]+\.F64\b", assembly),
    }


def _read_amd(compiled: Any) -> dict[str, int]:
    """From the assembly and the notes at its end."""
    assembly = compiled.asm["amdgcn"]

    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly has no note {name}")
        return int(found[1])

    return {
        "registers": note("vgpr_count"),
        "spills": note("vgpr_spill_count") + note("sgpr_spill_count"),
        "shared_bytes": int(compiled.metadata.shared),
        "atomics": _count(r"\b(?:global|buffer|flat)_atomic", assembly),
        "float64": _count(r"\bv_\w+_f64", assembly),
    }


Accesses = Mapping[tuple[str, int], list[int]]


def _ptx_accesses(ptx: str) -> Accesses:
    """The widths in bytes of the loads and stores to each parameter: ``("load" or "store", parameter) -> widths``."""
    # An address is a 64-bit register, computed from others by instructions whose first operand is the result.
    computed = re.findall(r"^\s*(?:@\S+\s+)?(\w+)[\w.]*\s+(%rd\d+),\s*([^;]+);", ptx, re.M)
    origins: dict[str, set[int]] = {}
    sources: list[tuple[str, list[str]]] = []
    for operation, result, operands in computed:
        parameter = re.search(r"_param_(\d+)\]", operands)
        if operation == "ld" and parameter:
            origins.setdefault(result, set()).add(int(parameter[1]))
        elif operation != "ld":
            sources.append((result, re.findall(r"%rd\d+", operands)))
    _spread(origins, sources)
    accesses: dict[tuple[str, int], list[int]] = _Lists()
    for operation, vector, bits, operands in re.findall(
        r"\b(ld|st)\.global[\w.]*?(?:\.v(\d))?\.[bfsu](\d+)\s([^;]+);", ptx
    ):
        width = int(vector or 1) * int(bits) // 8
        address = re.search(r"\[\s*(%rd\d+)", operands)
        assert address is not None
        for parameter_index in origins.get(address[1], set()):
            accesses["load" if operation == "ld" else "store", parameter_index].append(width)
    # Into shared memory, asynchronously; a mask gives the bytes that are read, which are all or none.
    for address, size in re.findall(
        r"\bcp\.async\.c[ag]\.shared\.global[^\[]*\[[^\]]*\],\s*\[\s*(%rd\d+)[^\]]*\],\s*(\w+)", ptx
    ):
        for parameter_index in origins.get(address, set()):
            accesses["load", parameter_index].append(int(size, 0))
    return accesses


def _llvm_accesses(code: str) -> Accesses:
    """The same from LLVM code, in which parameter ``n`` is ``%n``."""
    pointer = r"ptr addrspace\(1\)(?: inreg| nofree| readonly| captures\(none\)| noundef)* (%\w+)"
    signature = re.search(r"^define .*$", code, re.M)
    assert signature is not None
    count = len(re.findall(r"%\d+", signature[0]))
    origins = {f"%{index}": {index} for index in range(count)}
    sources = [
        (result, re.findall(r"%\w+", operands))
        for result, operands in re.findall(
            r"^\s*(%\w+) = (?:getelementptr|phi|select|addrspacecast)\b(.*)$", code, re.M
        )
    ]
    _spread(origins, sources)
    accesses: dict[tuple[str, int], list[int]] = _Lists()
    kinds = (
        ("load", rf"= load (<[^>]+>|\w+), {pointer}"),
        ("store", rf"\bstore (<[^>]+>|\w+) [^,]+(?:, [^,]+)*?, {pointer}"),
    )
    for access, pattern in kinds:
        for type_name, address in re.findall(pattern, code):
            for parameter_index in origins.get(address, set()):
                accesses[access, parameter_index].append(_llvm_bytes(type_name))
    return accesses


def _llvm_bytes(type_name: str) -> int:
    count, element = re.fullmatch(r"(?:<(\d+) x )?(\w+)>?", type_name).groups()  # type: ignore[union-attr]
    sizes = {"half": 2, "bfloat": 2, "float": 4, "double": 8}
    return int(count or 1) * (sizes[element] if element in sizes else int(element.removeprefix("i")) // 8)


def _spread(origins: dict[str, set[int]], sources: list[tuple[str, list[str]]]) -> None:
    """Give every result the origins of its operands, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for result, operands in sources:
            for operand in operands:
                missing = origins.get(operand, set()) - origins.get(result, set())
                if missing:
                    origins.setdefault(result, set()).update(missing)
                    changed = True


class _Lists(dict[tuple[str, int], list[int]]):
    """A list for every key."""

    def __missing__(self, key: tuple[str, int]) -> list[int]:
        return self.setdefault(key, [])


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

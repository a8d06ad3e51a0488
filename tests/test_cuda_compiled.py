"""The CUDA convolution compiled for GPUs that are not here: no spills, no atomics, tensor cores, 16-byte accesses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import cuda_builds
import pytest

pytestmark = pytest.mark.skipif(
    cuda_builds.missing() is not None, reason=f"the CUDA convolution cannot be compiled here: {cuda_builds.missing()}"
)

TENSOR_CORE = {
    "convolution_bfloat16": "HMMA.16816.F32.BF16",
    "convolution_float16": "HMMA.16816.F32",
    "convolution_tfloat32": "HMMA.1688.F32.TF32",
}


def _architectures() -> list[str]:
    if cuda_builds.missing() is not None:
        return ["sm_80"]
    listed = subprocess.run([cuda_builds.nvcc() or "", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return ["sm_80", "sm_90a", *(["sm_100"] if "compute_100\n" in listed.stdout else [])]


ARCHITECTURES = _architectures()
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kernel compiled for every architecture; once, however many processes test."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    return cuda_builds.once(shared / "cubins", lambda place: cuda_builds.compile_for_gpus(ARCHITECTURES, place))


def _instructions(cubin: Path) -> Counter[str]:
    """How often each machine instruction stands in a file, by its name with everything behind the first dot."""
    tool = shutil.which("cuobjdump")
    if tool is None and find_spec("triton") is not None:
        from triton import knobs

        tool = knobs.nvidia.cuobjdump.path
    if tool is None:
        pytest.skip("cuobjdump is neither on the path nor in Triton, and it is what reads machine code")
    listing = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    # An instruction stands behind its address and perhaps a predicate.
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing, re.MULTILINE))


@each_architecture
@pytest.mark.parametrize("kernel", [kernel.stem for kernel in cuda_builds.KERNELS])
def test_no_kernel_spills(cubins: Path, kernel: str, architecture: str) -> None:
    log = (cubins / f"{kernel}.{architecture}.log").read_text()
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    # The convolutions come for wide and for narrow blocks of filters.
    assert len(spills) == (2 if kernel.startswith("convolution") else 1), log
    assert set(spills) == {("0", "0", "0")}, log


@each_architecture
@pytest.mark.parametrize("kernel", [kernel.stem for kernel in cuda_builds.KERNELS])
def test_no_kernel_uses_atomics(cubins: Path, kernel: str, architecture: str) -> None:
    instructions = _instructions(cubins / f"{kernel}.{architecture}.cubin")
    assert instructions.total() > 50
    assert not [name for name in instructions if re.match(r"(ATOM|RED)(G|S)?(\.|$)", name)]


@each_architecture
@pytest.mark.parametrize("kernel", TENSOR_CORE)
def test_tensor_cores_and_16_byte_accesses(cubins: Path, kernel: str, architecture: str) -> None:
    instructions = _instructions(cubins / f"{kernel}.{architecture}.cubin")
    assert instructions[TENSOR_CORE[kernel]] > 0

    def widths(start: str) -> set[str]:
        return {
            name.split(".")[-1] if name.endswith(("128", "64")) else "narrow"
            for name in instructions
            if re.match(start, name)
        }

    # x and W, on their way into shared memory.
    assert widths(r"LDGSTS\b") == {"128"}
    # y and s; beside them the sums of rows, one number for each. And the tap sums; beside them bias and coefficients,
    # once for each block.
    assert widths(r"STG\b") == {"128", "narrow"}
    assert widths(r"LDG\b") == {"128", "narrow"}
    assert instructions["STG.E.128"] > instructions["STG.E"]


@each_architecture
def test_float32_is_not_rounded_to_tf32(cubins: Path, architecture: str) -> None:
    instructions = _instructions(cubins / f"convolution_float32.{architecture}.cubin")
    assert instructions["FFMA"] + instructions["FFMA2"] >= 512
    assert not [name for name in instructions if name.startswith("HMMA")]

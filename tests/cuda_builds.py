"""Builds for the tests of the CUDA convolution: for GPUs that are not here, and for the host (tests/cuda)."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
CSRC = REPOSITORY / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
setup = runpy.run_path(str(REPOSITORY / "setup.py"), run_name="setup")


@cache
def nvcc() -> str | None:
    """The compiler."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(beside) if beside.exists() else None)


@cache
def missing() -> str | None:
    """Why nothing can be compiled; None when it can."""
    if nvcc() is None:
        return "nvcc is not installed"
    try:
        setup["cutlass_headers"]()
    except setup["NativeBuildError"] as error:
        return str(error)
    return None


def toolkit() -> Path:
    """The directory of the toolkit."""
    command = [nvcc() or "", "--dryrun", "-x", "cu", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", told.stderr, re.MULTILINE)
    assert top is not None, told.stderr
    return Path(top[1].strip()).resolve()


def run_all(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run commands, two at a time, and return what they print. One that fails is an AssertionError."""

    def run(command: Sequence[str]) -> str:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, " ".join(command) + "\n" + finished.stdout + finished.stderr
        return finished.stdout + finished.stderr

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, commands))


def once(directory: Path, build: Callable[[Path], None]) -> Path:
    """The directory, filled by the first of several processes that ask for it."""
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    done = directory / "done"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            build(directory)
            done.touch()
    return directory


def compile_for_gpus(architectures: Sequence[str], directory: Path) -> None:
    """``<kernel>.<architecture>.cubin`` and ``.log`` for every .cu file, with the flags of setup.py."""
    jobs = [(kernel, architecture) for kernel in KERNELS for architecture in architectures]
    commands = []
    for kernel, architecture in jobs:
        output = directory / f"{kernel.stem}.{architecture}.cubin"
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch={architecture}", "-Xptxas=-v"]
        headers = [f"-I{CSRC}", "-isystem", str(setup["cutlass_headers"]())]
        commands.append([nvcc() or "", *flags, *headers, "-cubin", str(kernel), "-o", str(output)])
    for (kernel, architecture), log in zip(jobs, run_all(commands), strict=True):
        (directory / f"{kernel.stem}.{architecture}.log").write_text(log)


def compile_for_host(directory: Path) -> None:
    """``convolution.so``: the kernels, their binding under the CPU's key, and C functions for ctypes."""
    compiler = os.environ.get("CXX", "c++").split()
    include = toolkit() / "include"
    torch_include = Path(torch.__file__).parent / "include"
    headers = [
        CSRC,
        REPOSITORY / "tests" / "cuda",
        setup["cutlass_headers"](),
        include,
        include / "cccl",
        torch_include,
    ]
    # CUTLASS is written for nvcc: a C++ compiler finds some of its declarations out of order (-fpermissive).
    flags = ["-std=c++17", "-O1", "-w", "-fpermissive", "-fPIC", *(f"-I{path}" for path in headers)]
    of_torch = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={setup['TARGET_TORCH']}"]
    device = ["-include", str(REPOSITORY / "tests" / "cuda" / "host_device.h"), "-x", "c++"]
    sources = dict.fromkeys(KERNELS, device)
    sources[CSRC / "cuda" / "convolution.cpp"] = []
    sources[REPOSITORY / "tests" / "cuda" / "host_convolution.cpp"] = []
    sources[REPOSITORY / "tests" / "cuda" / "host_ops.cpp"] = of_torch
    objects = [str(directory / f"{source.stem}.o") for source in sources]
    run_all(
        [
            [*compiler, *flags, *extra, "-c", str(source), "-o", output]
            for (source, extra), output in zip(sources.items(), objects, strict=True)
        ]
    )
    libraries = Path(torch.__file__).parent / "lib"
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-Wl,-Bsymbolic", "-Wl,-z,defs"]
    run_all([[*compiler, "-shared", *objects, "-o", str(directory / "convolution.so"), *link]])

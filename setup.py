"""Builds the native CPU module where torch and a C++ compiler are found, and a pure-Python package where they are not.

Beside it the native CUDA module, where torch is a CUDA build and nvcc and the CUTLASS headers are found.

Environment variables:

* ``CHAINZRULE_KERNELS_NO_NATIVE=1``: do not build the native modules.
* ``CHAINZRULE_KERNELS_REQUIRE_NATIVE=1``: fail when the CPU module cannot be built.
* ``CHAINZRULE_KERNELS_NO_CUDA=1``: do not build the CUDA module.
* ``CHAINZRULE_KERNELS_REQUIRE_CUDA=1``: fail when it cannot be built.
* ``CHAINZRULE_KERNELS_CUTLASS_DIR``: where the CUTLASS headers are (the directory that holds ``cutlass/``, or its
  parent); otherwise those of the installed package nvidia-cutlass.
* ``TORCH_CUDA_ARCH_LIST``: the architectures to compile for, such as ``8.0;9.0+PTX``; otherwise those of the GPUs that
  torch sees, and without one 8.0 with PTX for newer ones.
* ``CHAINZRULE_KERNELS_SANITIZE=1``: build it under AddressSanitizer and UndefinedBehaviorSanitizer.
* ``MAX_JOBS``: how many compilers run at once. ``CXX``: which compiler.

Everything else that describes the package is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel

MODULE = "chainzrule_kernels._cpu"
CUDA_MODULE = "chainzrule_kernels._cuda"
OLDEST_ARCHITECTURE = (8, 0)

# Arithmetic keeps IEEE semantics for NaN and infinity; only contraction to fused multiply-add, errno and floating-point
# traps are given up, so that loops vectorise.
OPTIMISATION_FLAGS = [
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    # `#pragma omp simd` without an OpenMP runtime: threads come from torch.
    "-fopenmp-simd",
    # Python's own compiler flags often ask for debug information; it takes longer to write than the code.
    "-g0",
]
SANITIZER_FLAGS = [
    "-fsanitize=address,undefined",
    # Undefined behaviour ends the process instead of a line on stderr that nobody reads.
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
    "-DCHAINZRULE_KERNELS_SANITIZE",
]
# The oldest torch whose stable ABI the module may use: it then loads in that version and in every newer one.
TARGET_TORCH = "0x020a000000000000"


class NativeBuildError(Exception):
    """A native module cannot be built; the message says why in one line."""


def switched_on(variable: str) -> bool:
    """Whether an environment variable is set to something other than 0."""
    return os.environ.get(variable, "0") not in ("", "0")


def without(device: str, reason: str) -> None:
    """Say that the package goes without the native module for a device, or stop if the user requires it."""
    required = {"CPU": "CHAINZRULE_KERNELS_REQUIRE_NATIVE", "CUDA": "CHAINZRULE_KERNELS_REQUIRE_CUDA"}[device]
    instead = {"CPU": "in plain PyTorch", "CUDA": "with PyTorch's convolution"}[device]
    message = f"chainzrule_kernels: the native {device} module is not built: {reason}"
    if switched_on(required):
        raise SystemExit(f"{message} ({required} is set)")
    # pip first asks for the metadata and then builds; the line belongs to the second.
    if not {"egg_info", "dist_info"}.intersection(sys.argv):
        print(f"{message}; the package works without it, {instead}.", file=sys.stderr, flush=True)


def check_compiler() -> None:
    """Raise unless the compiler that torch's build would call can compile C++17."""
    compiler = os.environ.get("CXX", "c++")
    command = [*compiler.split(), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    try:
        finished = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
    except OSError as error:
        raise NativeBuildError(f"no C++ compiler ({compiler}: {error.strerror})") from error
    if finished.returncode != 0:
        raise NativeBuildError(f"the C++ compiler {compiler} cannot compile C++17")


def native_modules() -> tuple[list[Any], dict[str, type[Command]]]:
    """The extensions and the commands that build them.

    Raises:
        NativeBuildError: when there is nothing to build the CPU module with.
    """
    if switched_on("CHAINZRULE_KERNELS_NO_NATIVE"):
        raise NativeBuildError("CHAINZRULE_KERNELS_NO_NATIVE is set")
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise NativeBuildError(
            f"torch cannot be imported ({error}); install torch first, then build with pip's --no-build-isolation"
        ) from error
    check_compiler()

    extensions = [cpu_extension(cpp_extension)]
    try:
        extensions += cuda_extension(cpp_extension)
    except NativeBuildError as impossible:
        without("CUDA", str(impossible))

    class BuildNative(cpp_extension.BuildExtension):
        """torch's build, one module after the other; a failure leaves a package without the module and no traceback."""

        extensions: list[Any]
        not_built: Sequence[Any] = ()

        def build_extensions(self) -> None:
            asked_for, built = self.extensions, []
            for extension in asked_for:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    without("CUDA" if extension.name == CUDA_MODULE else "CPU", f"compiling it failed ({reason})")
                    # What an earlier build left must not be packed as if it were this one's.
                    Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.not_built = [extension for extension in asked_for if extension not in built]
            self.extensions = self.distribution.ext_modules = built

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            for module in self.not_built:
                Path(self.get_ext_filename(module.name)).unlink(missing_ok=True)

    return extensions, {"build_ext": BuildNative.with_options(use_ninja=True), "bdist_wheel": Wheel}


def cpu_extension(cpp_extension: Any) -> Any:
    """The native CPU module."""
    sanitize = SANITIZER_FLAGS if switched_on("CHAINZRULE_KERNELS_SANITIZE") else []
    extension = cpp_extension.CppExtension(
        MODULE,
        sorted(glob("csrc/cpu/*.cpp")),
        include_dirs=[str(Path("csrc").absolute()), *pybind11_include(cpp_extension)],
        extra_compile_args=[
            "-std=c++17",
            *OPTIMISATION_FLAGS,
            "-fvisibility=hidden",
            f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
            *sanitize,
        ],
        extra_link_args=[flag for flag in sanitize if flag.startswith("-fsanitize")],
    )
    # Only the C functions of the stable ABI are called, and they live in libtorch_cpu. Naming no other library keeps a
    # module built beside a CUDA torch loadable beside a CPU-only one.
    extension.libraries = ["torch_cpu"]
    return extension


def cuda_extension(cpp_extension: Any) -> list[Any]:
    """The native CUDA module; none where torch is built without CUDA, where nobody expects one.

    Raises:
        NativeBuildError: when something that it is built with is missing.
    """
    import torch

    if torch.version.cuda is None or switched_on("CHAINZRULE_KERNELS_SANITIZE"):
        return []
    if switched_on("CHAINZRULE_KERNELS_NO_CUDA"):
        raise NativeBuildError("CHAINZRULE_KERNELS_NO_CUDA is set")
    toolkit = cpp_extension.CUDA_HOME
    if toolkit is None or not (Path(toolkit) / "bin" / "nvcc").exists():
        raise NativeBuildError(f"there is no nvcc (CUDA_HOME is {toolkit})")
    headers = cutlass_headers()
    architectures = ";".join(cuda_architectures(torch))
    # From here torch's build takes the architectures.
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    definitions = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]
    named = f'-DCHAINZRULE_KERNELS_CUDA_ARCHITECTURES="{architectures}"'
    extension = cpp_extension.CUDAExtension(
        CUDA_MODULE,
        sorted([*glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")]),
        include_dirs=[str(Path("csrc").absolute()), str(headers), *pybind11_include(cpp_extension)],
        extra_compile_args={
            "cxx": ["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", *definitions, named],
            "nvcc": ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", *definitions],
        },
        # The runtime is linked in: the module then asks for no version of libcudart.
        extra_link_args=["-Wl,--exclude-libs,ALL"],
    )
    extension.libraries = ["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    return [extension]


def cutlass_headers() -> Path:
    """The directory of the CUTLASS headers.

    Raises:
        NativeBuildError: when there is none.
    """
    named = os.environ.get("CHAINZRULE_KERNELS_CUTLASS_DIR")
    if named:
        candidates = [Path(named), Path(named) / "include"]
        where = f"in CHAINZRULE_KERNELS_CUTLASS_DIR={named}"
    else:
        package = importlib.util.find_spec("cutlass_library")
        places = (package.submodule_search_locations or []) if package else []
        candidates = [Path(place) / "source" / "include" for place in places]
        where = "installed (pip install --no-deps nvidia-cutlass, or set CHAINZRULE_KERNELS_CUTLASS_DIR)"
    for directory in candidates:
        if (directory / "cutlass" / "cutlass.h").exists():
            return directory.absolute()
    raise NativeBuildError(f"the CUTLASS headers are not {where}")


def cuda_architectures(torch: Any) -> list[str]:
    """What to compile for, such as ``["8.0", "9.0+PTX"]``.

    Raises:
        NativeBuildError: when TORCH_CUDA_ARCH_LIST names none that the kernels run on.
    """
    asked_for = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked_for in ("", "native"):
        seen = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        fit = [f"{major}.{minor}" for major, minor in sorted(seen) if (major, minor) >= OLDEST_ARCHITECTURE]
        return fit or ["8.0+PTX"]
    named = [re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name) for name in re.split(r"[;\s]+", asked_for.strip())]
    fit = [name[0] for name in named if name and (int(name[1]), int(name[2])) >= OLDEST_ARCHITECTURE]
    if not fit:
        raise NativeBuildError(f"TORCH_CUDA_ARCH_LIST={asked_for} names no architecture from 8.0 on")
    return fit


def pybind11_include(cpp_extension: Any) -> list[str]:
    """Where the pybind11 headers are, unless torch carries them with its own."""
    if any((Path(path) / "pybind11").is_dir() for path in cpp_extension.include_paths()):
        return []
    try:
        import pybind11
    except ImportError as error:
        raise NativeBuildError("the pybind11 headers are neither in torch nor installed") from error
    return [pybind11.get_include()]


class Wheel(bdist_wheel):
    """A wheel that is tagged as pure Python when the native module turned out not to build."""

    def run(self) -> None:
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


if __name__ == "__main__":
    try:
        ext_modules, cmdclass = native_modules()
    except NativeBuildError as impossible:
        without("CPU", str(impossible))
        ext_modules, cmdclass = [], {}

    setup(ext_modules=ext_modules, cmdclass=cmdclass)

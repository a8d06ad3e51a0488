"""Builds the native CPU module where torch and a C++ compiler are found, and a pure-Python package where they are not.

Environment variables:

* ``CHAINZRULE_KERNELS_NO_NATIVE=1``: do not build the native module.
* ``CHAINZRULE_KERNELS_REQUIRE_NATIVE=1``: fail when it cannot be built.
* ``CHAINZRULE_KERNELS_SANITIZE=1``: build it under AddressSanitizer and UndefinedBehaviorSanitizer.
* ``MAX_JOBS``: how many compilers run at once. ``CXX``: which compiler.

Everything else that describes the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel

MODULE = "chainzrule_kernels._cpu"

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
    """The native module cannot be built; the message says why in one line."""


def switched_on(variable: str) -> bool:
    """Whether an environment variable is set to something other than 0."""
    return os.environ.get(variable, "0") not in ("", "0")


def without_native(reason: str) -> None:
    """Say that the package goes without its native module, or stop if the user requires it."""
    message = f"chainzrule_kernels: the native CPU module is not built: {reason}"
    if switched_on("CHAINZRULE_KERNELS_REQUIRE_NATIVE"):
        raise SystemExit(f"{message} (CHAINZRULE_KERNELS_REQUIRE_NATIVE is set)")
    # pip first asks for the metadata and then builds; the line belongs to the second.
    if not {"egg_info", "dist_info"}.intersection(sys.argv):
        print(f"{message}; the package works without it, in plain PyTorch.", file=sys.stderr, flush=True)


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


def native_module() -> tuple[list[Any], dict[str, type[Command]]]:
    """The extension and the command that builds it.

    Raises:
        NativeBuildError: when there is nothing to build it with.
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

    class BuildNative(cpp_extension.BuildExtension):
        """torch's build; a failure leaves a pure-Python package behind instead of a traceback."""

        extensions: list[Any]
        not_built: Sequence[Any] = ()

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                without_native(f"compiling it failed ({reason})")
                self.not_built = self.extensions
                self.extensions = self.distribution.ext_modules = []
                # What an earlier build left must not be packed as if it were this one's.
                for module in self.not_built:
                    Path(self.get_ext_fullpath(module.name)).unlink(missing_ok=True)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            for module in self.not_built:
                Path(self.get_ext_filename(module.name)).unlink(missing_ok=True)

    return [extension], {"build_ext": BuildNative.with_options(use_ninja=True), "bdist_wheel": Wheel}


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


try:
    ext_modules, cmdclass = native_module()
except NativeBuildError as impossible:
    without_native(str(impossible))
    ext_modules, cmdclass = [], {}

setup(ext_modules=ext_modules, cmdclass=cmdclass)

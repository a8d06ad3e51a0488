"""The Triton kernels on CPU tensors, in Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"

# Two halves of about equal length, for two test processes.
HALVES = ["tile", "not tile"]


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("half", HALVES)
def test_kernels_in_the_interpreter(half: str) -> None:
    import numpy
    import triton

    if release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
        pytest.skip("a loop in the interpreter of Triton before 3.7 needs NumPy before 2.4")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CHAINZRULE_KERNELS_NO_NATIVE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTEST_ADDOPTS": "",
    }
    # A child of a pytest-xdist worker is not one itself.
    for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
        del environment[name]
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("--confcutdir", str(FOLDER), "-k", half, str(FOLDER / "kernels.py")),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None
    assert int(passed[1]) > 50
    assert "skipped" not in finished.stdout

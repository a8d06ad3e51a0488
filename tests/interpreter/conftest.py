"""Triton's interpreter runs the kernels on CPU tensors, through the same operators as on a GPU.

Collected only by tests/test_triton_interpreter.py, in a process of its own: the interpreter has to be chosen before
Triton is imported, and the compiled CPU kernels must not be there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import chainzrule_kernels as ck
from chainzrule_kernels import _native, _triton
from chainzrule_kernels.ops import _launch

assert os.environ.get("TRITON_INTERPRET") == "1"
assert _native.cpu is None
_triton.register("CPU")
# Small shapes then take several programs, with several tiles each.
_launch.PROGRAMS = 8


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    """Triton serves every call, and memory that a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    with ck.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)

"""Loads the compiled CPU module, or says why there is none.

The import of ``chainzrule_kernels._cpu`` registers its kernels with the operators' CPU key (``csrc/cpu/ops.cpp``);
``ops/_convolution_cpu.py`` adds the convolution's, written in Python around two of them. From Python the module only
answers what it was built for.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

# The operators' schemas must stand before a compiled module adds kernels to them.
import chainzrule_kernels.ops  # noqa: F401

cpu: ModuleType | None = None
missing_because: str | None = None

if os.environ.get("CHAINZRULE_KERNELS_NO_NATIVE", "0") not in ("", "0"):
    missing_because = "switched off by the environment variable CHAINZRULE_KERNELS_NO_NATIVE"
else:
    try:
        cpu = import_module("chainzrule_kernels._cpu")
        import_module("chainzrule_kernels.ops._convolution_cpu").register()
    except ModuleNotFoundError:
        missing_because = (
            "the compiled CPU module is not installed (it is built where torch and a C++ compiler are found)"
        )
    except ImportError as error:
        if os.environ.get("CHAINZRULE_KERNELS_INSTRUCTION_SET"):
            # The instruction set that was asked for is not there: not a case for the reference path.
            raise
        missing_because = f"the compiled CPU module is installed and does not load: {error}"

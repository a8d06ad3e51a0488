"""Registers the Triton kernels with the operators, or says why there are none.

Importing Triton costs a third of a second, so it is put off until the first call on a GPU: what is registered here are
thin functions that import the kernels when they first run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

# The operators' schemas must stand before kernels are added to them.
import chainzrule_kernels.ops
from chainzrule_kernels._registration import library

_OPERATORS = {
    "polynomial": "_dreg_triton",
    "polynomial_dreg": "_dreg_triton",
    "polynomial_dreg_backward": "_dreg_triton",
    "activation_dreg": "_dreg_triton",
    "activation_dreg_backward": "_dreg_triton",
    "polynomial_spatial_dreg": "_spatial_triton",
    "polynomial_spatial_dreg_backward": "_spatial_triton",
    "activation_spatial_dreg": "_spatial_triton",
    "activation_spatial_dreg_backward": "_spatial_triton",
    "linear_polynomial_dreg": "_linear_triton",
    "linear_activation_dreg": "_linear_triton",
    "polynomial_tangent": "_tangent_triton",
    "polynomial_tangent_backward": "_tangent_triton",
    "activation_tangent": "_tangent_triton",
    "activation_tangent_backward": "_tangent_triton",
}
"""Every operator with a Triton kernel, and the module of :mod:`chainzrule_kernels.ops` that holds its kernels."""

missing_because: str | None = None
device_types = {"cuda"}
_checked = False


def serves(op: str) -> bool:
    """Whether an operator behind a public op has a Triton kernel. (Convolutions end in that over feature maps.)"""
    return ("polynomial_spatial_dreg" if op.startswith("polynomial_conv") else op) in _OPERATORS


def load(module: str = "_dreg_triton") -> ModuleType:
    """Import kernels, and with them Triton.

    Raises:
        RuntimeError: when Triton does not import, with the reason. From then on :data:`missing_because` tells it.
    """
    global missing_because
    try:
        return import_module(f"{chainzrule_kernels.ops.__name__}.{module}")
    except ImportError as error:
        missing_because = f"Triton is installed and does not load: {error}"
        raise RuntimeError(f"chainzrule_kernels: {missing_because}") from error


def check() -> None:
    """Import Triton, once, so that :data:`missing_because` is the truth."""
    global _checked
    if not _checked:
        _checked = True
        if missing_because is None:
            with contextlib.suppress(RuntimeError):
                load()


def register(dispatch_key: str) -> None:
    """Make the Triton kernels the operators' kernels for a dispatch key.

    ``"CUDA"`` serves NVIDIA and AMD GPUs. ``"CPU"`` is for Triton's interpreter (``TRITON_INTERPRET=1``), where no
    compiled CPU module is loaded.
    """
    for name, module in _OPERATORS.items():
        library.impl(name, _kernel(name, module), dispatch_key)
    device_types.add(dispatch_key.lower())


def _installed() -> bool:
    """Whether Triton is there. An import hook that refuses it may raise rather than find nothing."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def _kernel(name: str, module: str) -> Callable[..., Any]:
    """The operator's function, which replaces itself at the first call."""
    loaded: Callable[..., Any] | None = None

    def kernel(*inputs: Any) -> Any:
        nonlocal loaded
        if loaded is None:
            loaded = getattr(load(module), name)
        return loaded(*inputs)

    return kernel


if os.environ.get("CHAINZRULE_KERNELS_NO_TRITON", "0") not in ("", "0"):
    missing_because = "switched off by the environment variable CHAINZRULE_KERNELS_NO_TRITON"
elif not _installed():
    missing_because = "Triton is not installed"
else:
    register("CUDA")

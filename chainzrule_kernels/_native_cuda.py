"""Loads the compiled CUDA module, or says why there is none, and puts its convolution in the operator's place for CUDA.

The module holds one operator, ``chainzrule_kernels_cuda::polynomial_convolution`` (``csrc/cuda/ops.cpp``), for the
calls that CUTLASS's main loop takes. The function here is what the package's operator runs on CUDA tensors: it asks
PyTorch whether TF32 is allowed, and leaves to the definition what the kernel does not take.
"""

from __future__ import annotations

import os
import re
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# The operators' schemas must stand before a compiled module adds kernels to them.
import chainzrule_kernels.ops  # noqa: F401
from chainzrule_kernels._registration import library
from chainzrule_kernels._tracing import constant_while_running
from chainzrule_kernels.ops import _convolution_rule as rule
from chainzrule_kernels.ops._convolution_operator import operator

Three = tuple[Tensor, Tensor, Tensor]

OPS = frozenset(("polynomial_conv1d", "polynomial_conv1d_dreg", "polynomial_conv2d", "polynomial_conv2d_dreg"))
"""The public ops that the module serves."""

DEVICE_TYPE = "cuda"
cuda: ModuleType | None = None
missing_because: str | None = None

if os.environ.get("CHAINZRULE_KERNELS_NO_CUDA", "0") not in ("", "0"):
    missing_because = "switched off by the environment variable CHAINZRULE_KERNELS_NO_CUDA"
else:
    try:
        cuda = import_module("chainzrule_kernels._cuda")
    except ModuleNotFoundError:
        missing_because = (
            "the compiled CUDA module is not installed (it is built where torch is a CUDA build and nvcc and the "
            "CUTLASS headers are found)"
        )
    except ImportError as error:
        missing_because = f"the compiled CUDA module is installed and does not load: {error}"


def built_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a module compiled for ``architectures``, such as ``"8.0;9.0+PTX"``, runs on a device.

    Machine code runs on its own major version from its minor version on, with a letter behind it on that very version;
    PTX runs on everything that is newer.
    """
    for named in re.finditer(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architectures):
        version = (int(named[1]), int(named[2]))
        if version == capability:
            return True
        if not named[3] and version < capability and (named[4] or version[0] == capability[0]):
            return True
    return False


@constant_while_running
def device_properties(device: torch.device) -> tuple[int, int, int]:
    """Compute capability, major and minor, and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor, properties.multi_processor_count


@constant_while_running
def no_kernel_for(device: torch.device) -> str | None:
    """Why there is no compiled kernel for a device; None when there is."""
    if device.type != DEVICE_TYPE:
        return f"it serves CUDA tensors, and this one is on {device}"
    if cuda is None:
        return missing_because
    major, minor, _ = device_properties(device)
    architectures = cuda.built_for()["architectures"]
    if not built_for(architectures, (major, minor)):
        return f"the compiled CUDA module is built for {architectures}, and {device} is {major}.{minor}"
    return None


def cannot(x: Tensor, *call: Any) -> str | None:
    """Why the compiled kernel cannot serve a convolution op; None when it can.

    Args:
        x: the op's first argument.
        *call: its other arguments: ``weight, bias, coeffs, stride, padding, dilation, groups``. Without them the
            question is only whether there is a kernel for the device.
    """
    reason = no_kernel_for(x.device)
    if reason is not None or not call:
        return reason
    return rule.cannot(_problem(x, *call))


def not_worthwhile(x: Tensor, *call: Any) -> str | None:
    """Why the library and one fused pass are expected to be faster for a call that :func:`cannot` allows."""
    major, minor, multiprocessors = device_properties(x.device)
    return rule.not_worthwhile(_problem(x, *call), (major, minor), multiprocessors) if call else None


def _problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coeffs: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> rule.Problem:
    return rule.problem(x, weight, stride, padding, dilation, groups)


def polynomial_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coeffs: Tensor,
    tap_sq: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    with_norm: bool,
    keep_s: bool,
) -> Three:
    """The operator's kernel for CUDA tensors: the compiled one, or the definition for what that does not take."""
    call = rule.problem(x, weight, stride, padding, dilation, groups)
    if rule.cannot(call) is not None:
        inputs = (x, weight, bias, coeffs, tap_sq, stride, padding, dilation, groups, with_norm, keep_s)
        return operator.definition_as_kernel(*inputs)
    compiled = torch.ops.chainzrule_kernels_cuda.polynomial_convolution.default
    tf32 = call.arithmetic == "tfloat32"
    return compiled(x, weight, bias, coeffs, tap_sq, stride, padding, dilation, with_norm, keep_s, tf32)


if cuda is not None:
    library.impl("polynomial_convolution", polynomial_convolution, "CUDA")

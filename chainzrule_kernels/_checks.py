"""Argument checks, made before any kernel runs. Each error names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainzrule_kernels._remembered import remembered
from chainzrule_kernels.functions import ACTIVATION_KINDS, MAX_DEGREE

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = "float32, float64, bfloat16 or float16"


def check_floating(name: str, value: Any) -> None:
    """``value`` is a dense tensor of one of the four floating dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name}: expected dtype {_DTYPE_NAMES}, got {_dtype(value)}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if value.is_nested else value.layout}")


def check_z(z: Any, name: str = "z") -> None:
    """``z (..., N)`` has at least one dimension."""
    check_floating(name, z)
    if z.dim() == 0:
        raise ValueError(f"{name}: expected shape (..., N) with at least one dimension, got a 0-d tensor")


def check_feature_maps(z: Any, name: str = "z") -> None:
    """``z (B, C, *spatial)`` has at least two dimensions."""
    check_floating(name, z)
    if z.dim() < 2:
        raise ValueError(f"{name}: expected shape (B, C, *spatial) with at least two dimensions, got {_shape(z)}")


def check_coeffs(coeffs: Any, z: Tensor, channels: int | None = None) -> None:
    """``coeffs`` is ``(D+1,)`` or ``(D+1, N)`` with ``1 <= D <= 8``, on the device of ``z``."""
    check_floating("coeffs", coeffs)
    if coeffs.dim() not in (1, 2):
        raise ValueError(f"coeffs: expected shape (D+1,) or (D+1, N), got {_shape(coeffs)}")
    degree = coeffs.shape[0] - 1
    if not 1 <= degree <= MAX_DEGREE:
        raise ValueError(
            f"coeffs: expected degree D between 1 and {MAX_DEGREE}, that is 2 to {MAX_DEGREE + 1} coefficients in the "
            f"first dimension, got {_shape(coeffs)}"
        )
    channels = z.shape[-1] if channels is None else channels
    if coeffs.dim() == 2 and coeffs.shape[1] != channels:
        raise ValueError(
            f"coeffs: expected one polynomial for each of the {channels} channels, that is shape "
            f"({coeffs.shape[0]}, {channels}), got {_shape(coeffs)}"
        )
    check_same_device("coeffs", coeffs, z)


def check_row_sq(row_sq: Any, z: Tensor) -> None:
    """``row_sq`` is None or ``(N,)``, on the device of ``z``."""
    if row_sq is None:
        return
    check_floating("row_sq", row_sq)
    if row_sq.dim() != 1 or row_sq.shape[0] != z.shape[-1]:
        raise ValueError(
            f"row_sq: expected shape ({z.shape[-1]},), one squared row norm for each channel, got {_shape(row_sq)}"
        )
    check_same_device("row_sq", row_sq, z)


def check_tap_sq(tap_sq: Any, z: Tensor) -> None:
    """``tap_sq`` is None, ``(C,)`` or ``(C, *spatial)``, on the device of ``z``."""
    if tap_sq is None:
        return
    check_floating("tap_sq", tap_sq)
    if tap_sq.shape not in (z.shape[1:2], z.shape[1:]):
        sizes = ", ".join(str(size) for size in z.shape[1:])
        raise ValueError(
            f"tap_sq: expected shape ({z.shape[1]},) or ({sizes}), the sum of squared weights at each channel or each "
            f"position, got {_shape(tap_sq)}"
        )
    check_same_device("tap_sq", tap_sq, z)


def check_z_dot(z_dot: Any, z: Tensor) -> None:
    """``z_dot`` is ``(T, *z.shape)`` with the dtype and device of ``z``."""
    check_floating("z_dot", z_dot)
    if z_dot.dim() != z.dim() + 1 or z_dot.shape[1:] != z.shape:
        sizes = ", ".join(str(size) for size in z.shape)
        raise ValueError(f"z_dot: expected shape (T, {sizes}), T tangents of z, got {_shape(z_dot)}")
    if z_dot.dtype != z.dtype:
        raise TypeError(f"z_dot: expected the dtype of z, {_dtype(z)}, got {_dtype(z_dot)}")
    check_same_device("z_dot", z_dot, z)


def check_kind(kind: Any) -> None:
    """``kind`` is one of the fixed activations."""
    if not isinstance(kind, str):
        raise TypeError(f"kind: expected a string, one of {', '.join(ACTIVATION_KINDS)}, got {type(kind).__name__}")
    if kind not in ACTIVATION_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(ACTIVATION_KINDS)}, got {kind!r}")


def check_flag(name: str, value: Any) -> None:
    """``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_linear(x: Any, weight: Any, bias: Any) -> None:
    """``x (..., in)``, ``weight (out, in)``, ``bias (out,)`` or None, all on one device."""
    check_z(x, "x")
    check_floating("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected shape (out_features, {x.shape[-1]}) for x of shape {_shape(x)}, got {_shape(weight)}"
        )
    check_same_device("weight", weight, x, "x")
    if bias is not None:
        check_floating("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {_shape(bias)}")
        check_same_device("bias", bias, x, "x")


def check_convolution(
    dimensions: int, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> None:
    """The arguments of a convolution with so many spatial dimensions, as in :func:`torch.nn.functional.conv2d`."""
    check_floating("x", x)
    check_floating("weight", weight)
    _check_windows(dimensions, x.shape, weight.shape, stride, padding, dilation, groups)
    check_same_device("weight", weight, x, "x")
    if bias is not None:
        check_floating("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {_shape(bias)}")
        check_same_device("bias", bias, x, "x")


@remembered
def _check_windows(
    dimensions: int, x_shape: Any, weight_shape: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> None:
    """The sizes of ``x`` and ``weight`` go together, and the windows fit into the padded ``x``."""
    sizes = ", ".join(["L"] if dimensions == 1 else ["H", "W"])
    if len(x_shape) not in (dimensions + 1, dimensions + 2):
        raise ValueError(f"x: expected shape (B, C, {sizes}) or (C, {sizes}), got {_sizes(x_shape)}")
    channels, spatial = x_shape[-dimensions - 1], x_shape[-dimensions:]
    _check_count("groups", groups, 1)
    if channels % groups != 0:
        raise ValueError(f"groups: expected a divisor of the {channels} channels of x, got {groups}")
    if len(weight_shape) != dimensions + 2 or weight_shape[1] != channels // groups or 0 in weight_shape:
        raise ValueError(
            f"weight: expected shape (K, {channels // groups}, *window) with {dimensions} sizes of the window, none of "
            f"them 0, for x of shape {_sizes(x_shape)} and groups={groups}, got {_sizes(weight_shape)}"
        )
    if weight_shape[0] % groups != 0:
        raise ValueError(f"groups: expected a divisor of the {weight_shape[0]} filters of weight, got {groups}")
    strides = _check_counts("stride", stride, dimensions, 1)
    dilations = _check_counts("dilation", dilation, dimensions, 1)
    pads = _check_padding(padding, dimensions, strides)
    for axis, (size, taps) in enumerate(zip(spatial, weight_shape[2:], strict=True)):
        reach = dilations[axis] * (taps - 1) + 1
        padded = size + (reach - 1 if padding == "same" else sum(pads[axis]))
        if padded < reach:
            raise ValueError(
                f"x: expected at least {reach} elements, padding included, in each spatial dimension for a window of "
                f"{taps} taps and dilation {dilations[axis]}, got {padded} in {_sizes(x_shape)}"
            )
        if size == 0:
            raise ValueError(f"x: expected at least one element in each spatial dimension, got {_sizes(x_shape)}")


def _check_padding(padding: Any, dimensions: int, strides: list[int]) -> list[tuple[int, int]]:
    """The padding before and behind each dimension; for ``"same"``, whatever."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding: expected a number, numbers, pairs, 'same' or 'valid', got {padding!r}")
        if padding == "same" and any(stride != 1 for stride in strides):
            raise ValueError(f"padding: expected numbers for a stride other than 1, got 'same' with stride {strides}")
        return [(0, 0)] * dimensions
    if isinstance(padding, (tuple, list)) and any(isinstance(entry, (tuple, list)) for entry in padding):
        if any(isinstance(entry, (tuple, list)) and len(entry) != 2 for entry in padding):
            raise ValueError(f"padding: expected pairs of 2 numbers, got {tuple(padding)}")
        pairs = [_check_counts("padding", entry, 2, 0) for entry in padding]
        if len(pairs) != dimensions:
            raise ValueError(f"padding: expected {dimensions} pairs, got {len(pairs)}")
        return [(low, high) for low, high in pairs]
    return [(pad, pad) for pad in _check_counts("padding", padding, dimensions, 0)]


def _check_counts(name: str, value: Any, count: int, least: int) -> list[int]:
    """So many whole numbers, or one for all of them."""
    if not isinstance(value, (tuple, list)):
        return [_check_count(name, value, least)] * count
    if len(value) not in (1, count):
        raise ValueError(f"{name}: expected a number or {count} numbers, got {tuple(value)}")
    counts = [_check_count(name, entry, least) for entry in value]
    return counts * count if len(counts) < count else counts


def _check_count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value}")
    return value


def check_same_device(name: str, value: Tensor, other: Tensor, other_name: str = "z") -> None:
    """``value`` lies where ``other`` lies."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device}, that of {other_name}, got {value.device}")


def _shape(value: Tensor) -> str:
    return _sizes(value.shape)


def _sizes(shape: Sequence[int]) -> str:
    sizes = ", ".join(str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")

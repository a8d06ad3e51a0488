"""Fused convolution, or the library's and one fused pass: the rule for CUDA tensors, from shapes and properties.

The fused kernel (``csrc/cuda``) applies the polynomial while the sums of the convolution are still on the chip. The
alternative lets cuDNN write ``s = conv(x, W) + b`` and reads it again for ``y = p(s)`` and the norm. Two questions
decide:

* :func:`cannot`: does the fused kernel take the call at all? It is a main loop of CUTLASS, with its limits. Nothing is
  padded to make a call fit.
* :func:`not_worthwhile`: is it expected to be faster? **By counting, not by measurement**: fusing saves one reading
  of ``s``; it costs time where the library has faster instructions than this main loop, which uses those of ``sm_80``.

``backends.choose`` asks both, ``explain`` prints the answer, and ``backend("cuda")`` skips the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chainzrule_kernels._tracing import constant_while_running
from chainzrule_kernels.ops._convolution import Geometry, Numbers, Padding, dtype_of_convolution, geometry

MAX_WINDOW = 32
"""Largest size of the window: the main loop keeps one bit for each of its rows and columns."""

MAX_TENSOR_BYTES = 1 << 31
"""What one sample of ``x`` or ``y``, or the weight, must stay below: the main loop counts bytes in 32 bits."""

TILE_ROWS = 128
"""Positions of the output that a thread block takes. It takes 128 filters, or 64 where that wastes less."""

OLDEST_CAPABILITY = (8, 0)


_VECTORS = {"bfloat16": 8, "float16": 8, "tfloat32": 4, "float32": 1}


@dataclass(frozen=True)
class Capability:
    """What the rule knows of an architecture.

    Attributes:
        share: the speed of the tensor-core instructions of ``sm_80`` as a part of the architecture's fastest, which the
            library uses.
        operations_for_each_byte: peak of bfloat16 operations in the time in which memory delivers one byte.
    """

    share: float
    operations_for_each_byte: float


CAPABILITIES = {9: Capability(share=0.63, operations_for_each_byte=206)}
"""By major version, where the instructions of ``sm_80`` are not the fastest. Hopper: ``mma`` reaches 63 % of ``wgmma``
(arXiv 2402.13499, on the H100); 989 Tflop/s over 4.8 TB/s (data sheet of the H200)."""

WITHOUT_FIGURES = (10, 11)
"""Major versions of which it is only known that they have faster instructions."""


@dataclass(frozen=True)
class Problem:
    """A call of a convolution op, as far as the rule looks at it.

    Attributes:
        arithmetic: ``"bfloat16"``, ``"float16"``, ``"tfloat32"``, ``"float32"``, or the name of a dtype that the kernel
            does not take.
        batch: samples.
        channels: of ``x``.
        filters: of ``weight``, which are the channels of ``y``.
        groups: as in :func:`torch.nn.functional.conv2d`.
        size: spatial sizes of ``x``, one or two, likewise everything below.
        window: spatial sizes of ``weight``.
        padding: on each side, or None where it differs between the sides.
        stride: between windows.
        dilation: between the taps of a window.
        channels_innermost: whether the channels of a position of ``x`` lie side by side (``torch.channels_last``).
    """

    arithmetic: str
    batch: int
    channels: int
    filters: int
    groups: int
    size: tuple[int, ...]
    window: tuple[int, ...]
    padding: tuple[int, ...] | None
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    channels_innermost: bool

    @property
    def out_size(self) -> tuple[int, ...]:
        """Spatial sizes of ``y``."""
        if self.padding is None:
            raise ValueError("padding: expected the same on both sides")
        where = Geometry(self.stride, tuple((size, size) for size in self.padding), self.dilation)
        return tuple(where.out_size(self.size, self.window))

    @property
    def itemsize(self) -> int:
        """Bytes of an element of ``x`` and ``y``."""
        return 2 if self.arithmetic in ("bfloat16", "float16") else 4

    @property
    def tiles(self) -> int:
        """Thread blocks of the fused kernel."""
        columns = tile_columns(self.filters)
        return -(-self.batch * _product(self.out_size) // TILE_ROWS) * -(-self.filters // columns)


def tile_columns(filters: int) -> int:
    """Filters that one thread block takes: as ``columns_of_tile`` in ``csrc/cuda/convolution.h``."""
    return 64 if -(-filters // 128) * 128 - filters >= 64 else 128


def problem(
    x: Tensor, weight: Tensor, stride: Numbers = 1, padding: Padding = 0, dilation: Numbers = 1, groups: int = 1
) -> Problem:
    """What the rule needs to know of a call.

    Args:
        x: ``(B, C, *spatial)``, or without ``B``; one or two spatial dimensions, as ``weight`` has.
        weight: ``(K, C / groups, *window)``.
        stride: as the public ops take it, and so the others.
        padding: likewise.
        dilation: likewise.
        groups: as in :func:`torch.nn.functional.conv2d`.
    """
    spatial = weight.dim() - 2
    window = tuple(weight.shape[2:])
    where = geometry(window, stride, padding, dilation)
    uneven = any(before != after for before, after in where.padding)
    batched = x.dim() == weight.dim()
    return Problem(
        arithmetic=arithmetic(dtype_of_convolution(x)),
        batch=x.shape[0] if batched else 1,
        channels=x.shape[1 if batched else 0],
        filters=weight.shape[0],
        groups=groups,
        size=tuple(x.shape[-spatial:]),
        window=window,
        padding=None if uneven else tuple(before for before, _ in where.padding),
        stride=where.stride,
        dilation=where.dilation,
        channels_innermost=x.stride(-spatial - 1) == 1 and not x.is_contiguous(),
    )


def arithmetic(dtype: torch.dtype) -> str:
    """How products are formed: for float32 by ``"tfloat32"`` where PyTorch's own convolutions may use it."""
    if dtype == torch.float32:
        return "tfloat32" if tf32_allowed() else "float32"
    return str(dtype).removeprefix("torch.")


@constant_while_running
def tf32_allowed() -> bool:
    """Whether PyTorch lets convolutions round float32 to TF32.

    ``torch.backends.cudnn.conv.fp32_precision``, and where that is not set ``torch.backends.cudnn.allow_tf32``.
    """
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    if precision != "none":
        return bool(precision == "tf32")
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        # The old setting and the new one contradict each other, and nothing was said of convolutions.
        return False


def cannot(call: Problem) -> str | None:
    """Why the fused kernel does not take a call; None when it does."""
    vector = _VECTORS.get(call.arithmetic)
    if vector is None:
        return _say("it takes bfloat16, float16 and float32, and x is {}", call.arithmetic)
    if call.groups != 1:
        return _say("it takes one group, and there are {}", call.groups)
    if call.padding is None:
        return "it takes the same padding on both sides"
    for name, count in (("channels of x", call.channels), ("filters", call.filters)):
        if count == 0 or count % vector != 0:
            return _say("in {} it takes a multiple of {} {}, and there are {}", call.arithmetic, vector, name, count)
    if any(size > MAX_WINDOW for size in call.window):
        return _say("it takes windows of at most {} taps in each direction, and this is {}", MAX_WINDOW, call.window)
    if min(call.out_size) < 1:
        return _say("the window does not fit into x of size {}", call.size)
    largest = max(
        call.channels * _product(call.size),
        call.filters * _product(call.out_size),
        call.filters * call.channels * _product(call.window),
    )
    if largest * call.itemsize >= MAX_TENSOR_BYTES:
        return "it takes samples and weights of less than 2 GiB each"
    return None


def not_worthwhile(call: Problem, capability: tuple[int, int], multiprocessors: int) -> str | None:
    """Why the library's convolution and one fused pass are expected to be faster; None when they are not.

    In the order in which they are asked:

    1. ``x`` has its channels outermost: the fused kernel would copy it first, and the outputs afterwards.
    2. There are fewer thread blocks than multiprocessors: the library splits small problems more finely. (Not asked
       while ``torch.compile`` traces, where the batch may be any.)
    3. float32 without TF32 and a window of more than one tap: the library has transforms (Winograd) that multiply
       less.
    4. The library has faster tensor-core instructions (Hopper and later), and the products of one output,
       ``C * window``, outweigh the reading of its ``s``. With ``f`` the share of :class:`Capability` and ``r`` its
       operations for each byte, fusing saves ``itemsize`` bytes and costs ``2 C window (1/f - 1)`` operations for each
       output, so that it pays up to ``C * window = itemsize * r / (2 (1/f - 1))``. TF32 has half the operations and
       twice the bytes of bfloat16, and so the same bound.

    Args:
        call: the call, which :func:`cannot` has nothing against.
        capability: of the device, as ``torch.cuda.get_device_capability()`` gives it.
        multiprocessors: of the device.
    """
    if not call.channels_innermost:
        return "x is not in channels_last: the fused kernel would copy x and its results"
    if not torch.compiler.is_compiling() and call.tiles < multiprocessors:
        return _say("it has {} thread blocks for {} multiprocessors, too few to fill them", call.tiles, multiprocessors)
    if call.arithmetic == "float32":
        if _product(call.window) > 1:
            return _say("in float32 the library multiplies less for a window of {} (Winograd)", call.window)
        return None
    if capability[0] in WITHOUT_FIGURES:
        return _say("sm_{}{} has faster tensor-core instructions, which only the library uses", *capability)
    if capability[0] in CAPABILITIES:
        bound = worthwhile_products(CAPABILITIES[capability[0]])
        products = call.channels * _product(call.window)
        if products > bound:
            return _say(
                "{} products for each output, and beyond {} the library's faster instructions on sm_{}{} outweigh what "
                "fusing saves",
                products,
                bound,
                *capability,
            )
    return None


def worthwhile_products(capability: Capability) -> int:
    """The most products ``C * window`` for each output with which fusing pays: 350 on Hopper."""
    itemsize = 2
    return int(itemsize * capability.operations_for_each_byte / (2 * (1 / capability.share - 1)))


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _say(reason: str, *values: Any) -> str:
    """The reason with its numbers; without them while ``torch.compile`` traces, to which they may be symbols."""
    if torch.compiler.is_compiling():
        return reason
    return reason.format(*(" x ".join(map(str, value)) if isinstance(value, tuple) else value for value in values))

"""How feature maps ``(B, C, *spatial)`` lie in memory: image by image, with the channels outermost or innermost."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def channels_innermost(z: Tensor) -> bool:
    """Whether the channels of a position lie side by side (``torch.channels_last``, for any number of sizes)."""
    return z.dim() > 2 and z.shape[1] > 1 and z.stride(1) == 1 and not z.is_contiguous()


def like_the_input(inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """An operator's output: feature maps with their channels where ``inputs[0]`` has them, anything else contiguous."""
    if output.dim() == inputs[0].dim() and channels_innermost(inputs[0]):
        return output.movedim(1, -1).contiguous().movedim(-1, 1)
    return output.contiguous()

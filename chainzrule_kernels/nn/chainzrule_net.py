"""A multilayer perceptron of polynomial layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from chainzrule_kernels.coefficients import check_count, check_flag
from chainzrule_kernels.nn.polynomial_linear import PolynomialLinear


class ChainzRuleNet(nn.Sequential):
    r"""Polynomial layers one behind the other, and a linear layer at the end (ChainzRule, arXiv 2605.15463).

    Args:
        sizes: the width of the input, of each hidden layer, and of the output; ``(64, 256, 256, 10)`` has two hidden
            layers.
        degree: of the polynomials, 1 to 8.
        bias: whether the layers have a bias.
        per_channel: whether each channel has its own polynomial; otherwise the channels of a layer share one.
        final_polynomial: whether the last layer has a polynomial too. By default it is a :class:`torch.nn.Linear`.
        noise: as in :class:`PolynomialLinear`.
        device, dtype: of the parameters.

    Shape:
        ``(..., sizes[0]) -> (..., sizes[-1])``.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        degree: int = 3,
        *,
        bias: bool = True,
        per_channel: bool = False,
        final_polynomial: bool = False,
        noise: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        try:
            sizes = tuple(sizes)
        except TypeError as error:
            raise TypeError(f"sizes: expected a sequence of ints, got {type(sizes).__name__}") from error
        check_flag("bias", bias)
        check_flag("final_polynomial", final_polynomial)
        if len(sizes) < 2:
            raise ValueError(f"sizes: expected at least two, the input's and the output's, got {sizes}")
        for position, size in enumerate(sizes):
            check_count(f"sizes[{position}]", size)
        layers: list[nn.Module] = []
        for position, (width_in, width_out) in enumerate(pairwise(sizes)):
            if position == len(sizes) - 2 and not final_polynomial:
                layers.append(nn.Linear(width_in, width_out, bias, device=device, dtype=dtype))
            else:
                layers.append(
                    PolynomialLinear(
                        width_in,
                        width_out,
                        bias,
                        degree,
                        per_channel=per_channel,
                        noise=noise,
                        device=device,
                        dtype=dtype,
                    )
                )
        super().__init__(*layers)

    def __getitem__(self, index: slice | int) -> nn.Module:
        """A layer, or several as a :class:`torch.nn.Sequential`."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer."""
        # model.compile() passes over the forward of torch.nn.Sequential and would compile layer by layer.
        for layer in self:
            x = layer(x)
        return x

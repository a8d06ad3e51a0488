"""The learnable scalars from which the published polynomials are built."""

from __future__ import annotations

import torch
from torch import nn

from chainzrule_kernels.coefficients import check_flag, check_number


class ScalarParameters(nn.Module):
    """A module with 0-d parameters that each start at a given value.

    Attributes:
        learnable: whether the scalars require gradients.
    """

    learnable: bool
    _starts: dict[str, float]

    def add_scalars(
        self,
        starts: dict[str, float],
        learnable: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register one parameter under each name and start it at its value."""
        check_flag("learnable", learnable)
        for name, start in starts.items():
            check_number(name, start)
        self.learnable = learnable
        self._starts = starts
        for name in starts:
            self.register_parameter(
                name, nn.Parameter(torch.empty((), device=device, dtype=dtype), requires_grad=learnable)
            )
        self.reset_polynomial()

    def reset_polynomial(self) -> None:
        """Start the scalars again at the values that the constructor was given."""
        with torch.no_grad():
            for name in self._starts:
                self.get_parameter(name).fill_(self._starts[name])

    def shown_starts(self) -> dict[str, float]:
        """Where the scalars start, under the names of the constructor's arguments."""
        return self._starts

    def describe_scalars(self) -> str:
        """Where the scalars start, for ``extra_repr``."""
        values = [f"{name}={value:g}" for name, value in self.shown_starts().items()]
        return ", ".join([*values, *([] if self.learnable else ["learnable=False"])])

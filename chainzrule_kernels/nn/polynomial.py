"""A learnable polynomial in the place of an activation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from chainzrule_kernels import _checks
from chainzrule_kernels.coefficients import check_count, check_degree
from chainzrule_kernels.nn.jacobian_record import ActivationRecords, JacobianRecord, active_record
from chainzrule_kernels.ops.polynomial.op import polynomial


class Polynomial(nn.Module):
    r"""``y = p(z) = c0 + c1 z + … + cD z^D`` with learnable coefficients (ChainzRule, arXiv 2605.15463).

    Args:
        num_channels: the size N of the last dimension of ``z`` for one polynomial per channel; None for one that all
            share. The papers do not say which of the two they use.
        degree: D, 1 to 8.
        noise: the standard deviation of the normal noise around the identity ``(0, 1, 0, …, 0)`` with which the
            coefficients start [a choice of this package].
        device, dtype: of the coefficients.

    Shape:
        ``(..., N) -> (..., N)``, in the dtype of the input.

    Attributes:
        coeffs: ``(D+1,)`` or ``(D+1, N)``, in ascending powers.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    jacobian_record: JacobianRecord | ActivationRecords | None = None  # set on the instance by DREG

    def __init__(
        self,
        num_channels: int | None = None,
        degree: int = 3,
        *,
        noise: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_degree(degree)
        if num_channels is not None:
            check_count("num_channels", num_channels)
        check_noise(noise)
        self.num_channels = num_channels
        self.degree = degree
        self.noise = noise
        shape = (degree + 1,) if num_channels is None else (degree + 1, num_channels)
        self.coeffs = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again at the identity with noise."""
        reset_coefficients(self.coeffs, self.noise)

    def forward(self, z: Tensor) -> Tensor:
        """``p(z)``."""
        coeffs = self.coeffs
        if coeffs.dim() == 2:
            _checks.check_z(z)
            if z.shape[-1] != coeffs.shape[1]:
                raise ValueError(
                    f"z: expected shape (..., num_channels) with num_channels = {coeffs.shape[1]}, got {tuple(z.shape)}"
                )
        record = active_record(self)
        return polynomial(z, coeffs) if record is None else record.polynomial(z, coeffs)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"num_channels={self.num_channels}, degree={self.degree}"


def reset_coefficients(coeffs: Tensor, noise: float) -> None:
    """Fill ``coeffs`` with the identity ``(0, 1, 0, …, 0)`` and normal noise of the given standard deviation."""
    with torch.no_grad():
        coeffs.normal_(0.0, noise) if noise else coeffs.zero_()
        coeffs[1] += 1.0


def check_noise(noise: float) -> None:
    """Raise unless ``noise`` is a finite number of at least 0."""
    if not isinstance(noise, int | float) or isinstance(noise, bool):
        raise TypeError(f"noise: expected a number, got {type(noise).__name__}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise: expected a finite number of at least 0, got {noise}")

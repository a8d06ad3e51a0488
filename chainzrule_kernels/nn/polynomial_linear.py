"""A linear layer with a learnable polynomial behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from chainzrule_kernels import _checks
from chainzrule_kernels.coefficients import check_count, check_degree, check_flag
from chainzrule_kernels.nn.jacobian_record import ActivationRecords, JacobianRecord, active_record
from chainzrule_kernels.nn.polynomial import check_noise, reset_coefficients
from chainzrule_kernels.ops._linear import linear_in_dtype_of_x
from chainzrule_kernels.ops.linear_polynomial_dreg.op import linear_polynomial_dreg
from chainzrule_kernels.ops.polynomial.op import polynomial


class PolynomialLinear(nn.Module):
    r"""``y = p(x Wᵀ + b)``, ``p`` a polynomial with learnable coefficients: the ChainzRule layer (arXiv 2605.15463).

    Args:
        in_features: the size of the last dimension of the input.
        out_features: the size of the last dimension of the output.
        bias: whether there is a ``b``.
        degree: D of the polynomial, 1 to 8.
        per_channel: whether each output channel has its own polynomial; otherwise all share one. The papers do not say
            which of the two they use.
        noise: the standard deviation of the normal noise around the identity ``(0, 1, 0, …, 0)`` with which the
            coefficients start [a choice of this package]. Weight and bias start as in :class:`torch.nn.Linear`.
        device, dtype: of the parameters.

    Shape:
        ``(..., in_features) -> (..., out_features)``, in the dtype of the input; under autocast, in the autocast dtype.

    Attributes:
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        coeffs: ``(D+1,)`` or ``(D+1, out_features)``, in ascending powers.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    jacobian_record: JacobianRecord | ActivationRecords | None = None  # set on the instance by DREG

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        degree: int = 3,
        *,
        per_channel: bool = False,
        noise: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        check_flag("bias", bias)
        check_degree(degree)
        check_flag("per_channel", per_channel)
        check_noise(noise)
        self.in_features = in_features
        self.out_features = out_features
        self.degree = degree
        self.per_channel = per_channel
        self.noise = noise
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        shape = (degree + 1, out_features) if per_channel else (degree + 1,)
        self.coeffs = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again: weight and bias as :class:`torch.nn.Linear`, the polynomial at the identity with noise."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        reset_coefficients(self.coeffs, self.noise)

    def forward(self, x: Tensor) -> Tensor:
        """``p(x Wᵀ + b)``."""
        weight, bias, coeffs, record = self.weight, self.bias, self.coeffs, active_record(self)
        _checks.check_z(x, "x")
        if x.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"x: expected shape (..., in_features) with in_features = {weight.shape[-1]}, got {tuple(x.shape)}"
            )
        if (
            isinstance(record, JacobianRecord)
            and record.linear is self
            and not record.forward_pass.measures_nonlinearity
        ):
            y, jac_sq = linear_polynomial_dreg(x, weight, bias, coeffs)
            record.add(jac_sq, self.out_features)
            return y
        _checks.check_linear(x, weight, bias)
        z = linear_in_dtype_of_x(x, weight, bias)
        return polynomial(z, coeffs) if record is None else record.polynomial(z, coeffs)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"degree={self.degree}, per_channel={self.per_channel}"
        )

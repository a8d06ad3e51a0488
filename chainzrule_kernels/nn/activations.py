r"""Polynomials in the place of an activation, with the parameters under which they were published.

They work on every element, so that they take ``(..., N)`` and feature maps alike. All are one polynomial
(:func:`chainzrule_kernels.polynomial`); a module only builds its coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chainzrule_kernels import coefficients
from chainzrule_kernels._checks import check_z
from chainzrule_kernels.coefficients import check_degree
from chainzrule_kernels.nn.jacobian_record import (
    ActivationRecords,
    JacobianRecord,
    active_record,
)
from chainzrule_kernels.nn.scalar_parameters import ScalarParameters
from chainzrule_kernels.ops.polynomial.op import polynomial


class PolynomialActivation(nn.Module):
    """``y = p(x)`` for every element, with the coefficients that a subclass builds.

    Attributes:
        rectified: whether the subclass's function is ``p(relu(x))``.
    """

    rectified = False
    jacobian_record: JacobianRecord | ActivationRecords | None = None  # set on the instance by DREG

    def coefficients(self) -> Tensor:
        """``coeffs (D+1,)`` in ascending powers, as a differentiable function of the parameters."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its coefficients are")

    def forward(self, x: Tensor) -> Tensor:
        """``p(x)``, or ``p(relu(x))`` where ``rectified``."""
        record = active_record(self)
        coeffs = self.coefficients()
        if record is None:
            check_z(x, "x")
            return polynomial(x, coeffs, rectified=self.rectified)
        return record.polynomial(x, coeffs, self.rectified)


class _ScalarActivation(ScalarParameters, PolynomialActivation):
    """A polynomial whose coefficients come from a degree and a few scalars."""

    def __init__(
        self,
        degree: int,
        starts: dict[str, float],
        learnable: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_degree(degree)
        self.degree = degree
        self.add_scalars(starts, learnable, device, dtype)

    def reset_parameters(self) -> None:
        """Start again."""
        self.reset_polynomial()

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"degree={self.degree}, {self.describe_scalars()}"


class ActPKN(_ScalarActivation):
    r"""``y = (x + c)^degree`` in the place of ReLU (PolyKervNets, SaTML 2023; arXiv 2312.15229).

    Args:
        degree: the power, 1 to 8; the authors' code calls it ``dp`` and has 2.
        c: where the learnable shift starts; ``cp`` there, 1.0.
        learnable: whether ``c`` is learned.
        device, dtype: of the parameter.

    Shape:
        ``(...) -> (...)``, at least one dimension, in the dtype of the input.

    Attributes:
        c: a 0-d parameter.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    c: nn.Parameter

    def __init__(
        self,
        degree: int = 2,
        *,
        c: float = 1.0,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(degree, {"c": c}, learnable, device, dtype)

    def coefficients(self) -> Tensor:
        """``coeffs (degree+1,)``, see :func:`chainzrule_kernels.coefficients.pkn`."""
        return coefficients.pkn(1.0, self.c, self.degree)


class ReactPKN(_ScalarActivation):
    r"""``y = a x^degree + b x + c`` in the place of ReLU (Regularized PolyKervNets, arXiv 2312.15229).

    The published start is the least-squares quadratic of ReLU on [-5, 5], ``(0.09375, 0.5, 0.46875)``, but for ``a``,
    which is a tenth of it. For the quadratic itself: ``a, b, c = ck.coefficients.least_squares_relu()`` and
    ``ReactPKN(a=a, b=b, c=c)``.

    Args:
        degree: of the highest power, 1 to 8; the authors' code calls it ``dp`` and has 2.
        a, b, c: where the learnable scalars start; ``ap``, ``bp``, ``cp`` there. ``a`` may take either sign.
        learnable: whether they are learned.
        device, dtype: of the parameters.

    Shape:
        ``(...) -> (...)``, at least one dimension, in the dtype of the input.

    Attributes:
        a, b, c: 0-d parameters.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    a: nn.Parameter
    b: nn.Parameter
    c: nn.Parameter

    def __init__(
        self,
        degree: int = 2,
        *,
        a: float = 0.009,
        b: float = 0.5,
        c: float = 0.47,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(degree, {"a": a, "b": b, "c": c}, learnable, device, dtype)

    def coefficients(self) -> Tensor:
        """``coeffs (degree+1,)``, see :func:`chainzrule_kernels.coefficients.react`."""
        return coefficients.react(self.a, self.b, self.c, self.degree)


class Hermite(PolynomialActivation):
    r"""``y = Σ_k a_k He_k(x) / k!`` with the probabilists' Hermite polynomials (torchortho, arXiv 2502.01247).

    Args:
        degree: D, 1 to 8 (3 by default, as elsewhere in this package).
        device, dtype: of the parameter.

    Shape:
        ``(...) -> (...)``, at least one dimension, in the dtype of the input.

    Attributes:
        a: ``(D+1,)``, starting at :func:`chainzrule_kernels.coefficients.hermite_start`.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    def __init__(
        self, degree: int = 3, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_degree(degree)
        self.degree = degree
        self.a = nn.Parameter(torch.empty(degree + 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again."""
        with torch.no_grad():
            self.a.copy_(coefficients.hermite_start(self.degree, dtype=torch.float64))

    def coefficients(self) -> Tensor:
        """``coeffs (D+1,)``, see :func:`chainzrule_kernels.coefficients.hermite`."""
        return coefficients.hermite(self.a)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"degree={self.degree}"


class PolyReLU(PolynomialActivation):
    r"""``y = bias + Σ_k weight_k relu(x)^k``, ``k = 1 … D`` (PolyCom, arXiv 2411.03884).

    One pass, :func:`chainzrule_kernels.polynomial` with ``rectified=True``: training keeps ``x``, not ``relu(x)``.

    Args:
        degree: D, 1 to 8.
        device, dtype: of the parameters.

    Shape:
        ``(...) -> (...)``, at least one dimension, in the dtype of the input.

    Attributes:
        weight: ``(D,)``, in ascending powers (the authors' code has them descending), each starting at ``1/D``; for
            the published ``D = 3`` that is 1/3.
        bias: 0-d, starting at 0.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    rectified = True

    def __init__(
        self, degree: int = 3, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_degree(degree)
        self.degree = degree
        self.weight = nn.Parameter(torch.empty(degree, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again."""
        nn.init.constant_(self.weight, 1 / self.degree)
        nn.init.zeros_(self.bias)

    def coefficients(self) -> Tensor:
        """``coeffs (D+1,)`` of the polynomial of ``relu(x)``."""
        return coefficients.polyrelu(self.weight, self.bias)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"degree={self.degree}"

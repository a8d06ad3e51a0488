"""Polynomials with shared or per-channel coefficients: value, derivatives and coefficient gradients (SPEC 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chainzrule_kernels.functions.base import where_rising
from chainzrule_kernels.functions.sums import sum_of_all, sum_over_leading

MAX_DEGREE = 8


class Polynomial:
    """``p(z) = c0 + c1 z + … + cD z^D`` with ``coeffs`` of shape ``(D+1,)`` or ``(D+1, N)``, in ascending order."""

    curved = True

    def __init__(self, coeffs: Tensor) -> None:
        self.coeffs = coeffs

    def derivatives(self, z: Tensor, order: int) -> tuple[Tensor, ...]:
        """``(p, p', …, p^(order))`` at ``z``, each by Horner's rule."""
        coeffs: Sequence[Tensor] = self.coeffs.unbind(0)
        results = [_horner(coeffs, z)]
        for _ in range(order):
            coeffs = [power * coefficient for power, coefficient in enumerate(coeffs)][1:]
            results.append(_horner(coeffs, z))
        return tuple(results)

    def let_through(self, z: Tensor, values: Tensor) -> Tensor:
        """``values``: a polynomial is flat at points alone."""
        return values

    def coefficient_gradient(self, z: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
        """The gradient with respect to ``coeffs`` of ``Σ_i Σ_m weights[m]_i p^(m)(z_i)``.

        Component ``k`` is ``Σ_i Σ_m weights[m]_i k (k-1) … (k-m+1) z_i^(k-m)``, summed over the elements that share the
        coefficient. ``None`` stands for a weight that is zero. The sums over the batch run in at least float32.
        """
        shared = self.coeffs.dim() == 1
        components = []
        for k in range(self.coeffs.shape[0]):
            total: Tensor | None = None
            factor = 1.0
            for m, weight in enumerate(weights[: k + 1]):
                if weight is not None:
                    term = weight if k == m else weight * z ** (k - m)
                    term = term if factor == 1.0 else factor * term
                    total = term if total is None else total + term
                factor *= k - m
            if total is None:
                components.append(torch.zeros_like(self.coeffs[k]))
            elif shared:
                components.append(sum_of_all(total))
            else:
                components.append(sum_over_leading(total))
        return torch.stack(components)


class RectifiedPolynomial(Polynomial):
    """``p(relu(z))``: PolyReLU (PolyCom, arXiv 2411.03884), with ``p`` as in :class:`Polynomial`.

    As PyTorch's relu it has the derivatives 0 at 0, and NaN passes through.
    """

    def derivatives(self, z: Tensor, order: int) -> tuple[Tensor, ...]:
        """``(p, p' 1[z > 0], …, p^(order) 1[z > 0])``, the polynomials taken at ``relu(z)``."""
        value, *derivatives = super().derivatives(torch.relu(z), order)
        return value, *(where_rising(z, derivative) for derivative in derivatives)

    def let_through(self, z: Tensor, values: Tensor) -> Tensor:
        """``values`` where relu rises, 0 elsewhere."""
        return where_rising(z, values)

    def coefficient_gradient(self, z: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
        """The same, of ``Σ_i Σ_m weights[m]_i f^(m)(z_i)`` with ``f(z) = p(relu(z))``."""
        of_value, *others = weights
        of_derivatives = [None if weight is None else where_rising(z, weight) for weight in others]
        return super().coefficient_gradient(torch.relu(z), (of_value, *of_derivatives))


def polynomial_of(coeffs: Tensor, rectified: bool) -> Polynomial:
    """``p(z)``, or ``p(relu(z))`` where ``rectified``."""
    return RectifiedPolynomial(coeffs) if rectified else Polynomial(coeffs)


def _horner(coeffs: Sequence[Tensor], z: Tensor) -> Tensor:
    if not coeffs:
        return torch.zeros_like(z)
    result = coeffs[-1] + torch.zeros_like(z)
    for coefficient in reversed(coeffs[:-1]):
        result = result * z + coefficient
    return result

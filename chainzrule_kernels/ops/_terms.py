"""Sums and products in which an absent term is ``None``: the notation of the derivative formulas.

A gradient that did not arrive is absent, not zero: ``0 · inf`` would turn it into NaN.
"""

from __future__ import annotations

from torch import Tensor

from chainzrule_kernels.functions.sums import sum_over_leading

Term = Tensor | float | None


def plus(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are present; ``None`` when there are none."""
    total: Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def times(*factors: Term) -> Tensor | None:
    """The product; ``None`` when a factor is absent. A float factor comes first."""
    product: Tensor | float = 1.0
    for factor in factors:
        if factor is None:
            return None
        product = factor if isinstance(product, float) and product == 1.0 else product * factor
    assert isinstance(product, Tensor)
    return product


def over_channels(term: Tensor | None) -> Tensor | None:
    """``Σ_j``: the sum over the last dimension."""
    return None if term is None else term.sum(-1)


def over_batch(term: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The sum over the leading dimensions that ``like`` has not; ``None`` when either is absent."""
    return None if term is None or like is None else sum_over_leading(term, like.dim())


def over_tangents(term: Tensor | None) -> Tensor | None:
    """``Σ_t``: the sum over the first dimension."""
    return None if term is None else term.sum(0)


def cast(term: Tensor | None, like: Tensor | None) -> Tensor | None:
    """``term`` in the dtype of ``like``; ``None`` when either is absent."""
    return None if term is None or like is None else term.to(like.dtype)


def column(term: Tensor | None) -> Tensor | None:
    """A per-sample quantity ``(...)`` as ``(..., 1)``, to meet tensors ``(..., N)``."""
    return None if term is None else term.unsqueeze(-1)

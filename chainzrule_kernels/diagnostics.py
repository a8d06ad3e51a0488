r"""What to look at while training: tails of per-sample quantities, and peaks of a history.

The papers speak of a tail ratio ``p99 / mean`` without saying of what. Here it is, unless one says otherwise, that of
the per-sample layer Jacobian norm ``‖J‖_F`` (:meth:`chainzrule_kernels.DREG.report`); :func:`input_gradient_norms` and
:func:`loss_gradient_norms` supply the two other candidates. A tail ratio near 1 also describes a layer that has
become linear, so the report shows a measure of nonlinearity beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Table", "input_gradient_norms", "loss_gradient_norms", "peak_volatility", "percentile", "tail_ratio"]

Row = TypeVar("Row")


def tail_ratio(values: Tensor | Iterable[float]) -> float:
    r"""``p99 / mean`` of a per-sample quantity that is not negative, such as ``jac_sq.sqrt()``.

    Args:
        values: a tensor of any shape, or numbers; one for each sample.

    Returns:
        The 99th percentile, linearly interpolated between samples, over the mean. NaN when the mean is 0 or NaN.

    Raises:
        TypeError, ValueError: when there is no value, a negative one, or they are not numbers.
    """
    flat = _numbers("values", values)
    mean = flat.mean().item()
    return percentile(flat, 99.0) / mean if mean != 0 else math.nan


def percentile(values: Tensor | Iterable[float], percent: float) -> float:
    """The value below which ``percent`` of the values lie, linearly interpolated between neighbours; NaN if one is NaN.

    Raises:
        TypeError, ValueError: when there is no value or a negative one, when they are not numbers, or when ``percent``
            is not a number from 0 to 100.
    """
    if not isinstance(percent, int | float) or isinstance(percent, bool):
        raise TypeError(f"percent: expected a number, got {type(percent).__name__}")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent: expected 0 to 100, got {percent}")
    flat = _numbers("values", values)
    if flat.isnan().any():
        return math.nan
    # torch.quantile refuses more than 2^24 elements.
    position = percent / 100 * (flat.numel() - 1)
    below = math.floor(position)
    low = flat.kthvalue(below + 1).values.item()
    if position == below:
        return low
    high = flat.kthvalue(below + 2).values.item()
    return low + (high - low) * (position - below)


def peak_volatility(history: Tensor | Iterable[float]) -> float:
    r"""``max / median`` of a quantity over the steps of a training run, such as the gradient norm.

    The papers use the term without a definition; this one is a choice of this package. 1 means a perfectly even run.

    Args:
        history: one value for each step, none of them negative.

    Returns:
        The ratio; the median of an even number of steps is the mean of the middle two. NaN when the median is 0 or NaN.

    Raises:
        TypeError, ValueError: when there is no value, a negative one, or they are not numbers.
    """
    flat = _numbers("history", history)
    median = percentile(flat, 50.0)
    return flat.max().item() / median if median != 0 else math.nan


def input_gradient_norms(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    r"""``‖∂f_i/∂x_i‖`` for each sample of a batch.

    Args:
        function: from a batch ``(B, …)`` to one number for each sample, ``(B,)``, samples not mixing; for instance
            ``lambda x: F.cross_entropy(model(x), targets, reduction="none")``.
        inputs: the batch.

    Returns:
        ``(B,)``, detached. Gradients of parameters are not touched.

    Raises:
        ValueError: when ``function`` does not give ``(B,)``.
    """
    inputs = inputs.detach().requires_grad_()
    with torch.enable_grad():
        outputs = function(inputs)
        if outputs.shape != inputs.shape[:1]:
            raise ValueError(f"function: expected an output of shape ({inputs.shape[0]},), got {tuple(outputs.shape)}")
        (gradient,) = torch.autograd.grad(outputs.sum(), inputs)
    return gradient.flatten(1).norm(dim=1)


def loss_gradient_norms(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor
) -> Tensor:
    r"""``‖∂loss_i/∂θ‖`` for each sample: the norm of the gradient that the sample alone would give the parameters.

    Args:
        model: a module whose forward takes a batch; its parameters that require gradients are ``θ``.
        loss: from the model's output and the targets of a batch of one sample to a 0-d tensor.
        inputs: ``(B, …)``.
        targets: ``(B, …)``.

    Returns:
        ``(B,)``, detached. Gradients of parameters are not touched.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    def loss_of_one(values: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (sample.unsqueeze(0),))
        return loss(output, target.unsqueeze(0))

    gradients = torch.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")(
        parameters, inputs, targets
    )
    squares = [gradient.detach().flatten(1).square().sum(1) for gradient in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


class Table(tuple[Row, ...]):
    """Rows of one dataclass, which print as an aligned table of the fields that its ``repr`` shows."""

    def __str__(self) -> str:
        if not self:
            return "(no rows)"
        rows: Sequence[Any] = self
        names = [field.name for field in dataclasses.fields(rows[0]) if field.repr]
        cells = [[name.replace("_", " ") for name in names]]
        cells += [[format_cell(getattr(row, name)) for name in names] for row in rows]
        widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
        numeric = [not any(isinstance(getattr(row, name), str) for row in rows) for name in names]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join(lines)


def format_cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(name: str, values: Any) -> Tensor:
    """The values as one dimension of float64 on the CPU: a diagnostic is read there, and its sums should not round."""
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(list(values), dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: expected a tensor or numbers, got {type(values).__name__}") from error
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got dtype {values.dtype}")
    if values.numel() == 0:
        raise ValueError(f"{name}: expected at least one value, got none")
    values = values.detach().to("cpu", torch.float64).flatten()
    if (values < 0).any():
        raise ValueError(f"{name}: expected values of at least 0, got {values.min().item()}")
    return values

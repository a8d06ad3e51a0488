r"""How large a rounding error may be: the one definition that ``validate`` and the tests use.

For each result and each gradient, from the same rounded inputs:

* *exact* is the op's definition computed in float64,
* the *error* of a tensor is ``max |tensor - exact|`` over its elements,
* the *plain error* is the error of the expression that a user of eager PyTorch would write in the data's own dtype
  (:meth:`~chainzrule_kernels.testing.cases.Case.plain_expression`), the largest of several draws of the data,
* the *allowance* is twice the plain error plus one ulp of the tensor's dtype at ``max |exact|``.

The gradient of a coefficient is a single sum, and the error of a single sum is now and then close to zero by luck.
Hence the several draws, and data whose sums do not cancel: gradients that arrive are positive, ``z`` leans to one side.

Where *exact*, rounded to the tensor's dtype, is finite, the tensor must be finite; where it is NaN or infinite the
tensor must be the same. Elements at which the plain expression overflows do not enlarge the allowance: the plain error
is that of its finite elements.

For float64 data *exact* is itself rounded to float64. The plain error is then that of float32, scaled by the ratio of
the two precisions, and the allowance has room for the error of *exact* too: three times the plain error plus one ulp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from chainzrule_kernels import backends
from chainzrule_kernels.testing.cases import Case, generator
from chainzrule_kernels.testing.layouts import Layout, contiguous

_DRAWS = 5


@dataclass(frozen=True)
class Accuracy:
    """The error of one tensor and what it may be.

    Attributes:
        quantity: the name of a result, such as ``"jac_sq"``, or of a gradient, such as ``"d coeffs"``.
        error: the largest difference from the exact values; infinite if an element is wrongly finite or not finite.
        allowance: the largest error allowed.
    """

    quantity: str
    error: float
    allowance: float

    @property
    def passed(self) -> bool:
        """Whether the error stays within the allowance."""
        return self.error <= self.allowance

    @property
    def used(self) -> float:
        """The error as a fraction of the allowance."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowance if self.allowance > 0 else math.inf


def measure(
    case: Case,
    layout: Layout,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    backend_names: Sequence[str],
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, list[Accuracy]]:
    """The accuracy of every result and every gradient of a case, for each backend.

    Args:
        case: the case.
        layout: shape and arrangement of the data, and of the gradients that arrive.
        dtype: of the data.
        parameter_dtype: of the other tensors.
        backend_names: the backends to judge; ``"auto"`` is one.
        device: where.
        seed: of the data.
    """
    tensors, gradients = draw(case, layout, dtype, parameter_dtype, device, seed)
    exact = in_float64(case, tensors, gradients)
    plain_errors = _plain_errors(case, tensors, gradients, exact, dtype)
    judged = {}
    for name in backend_names:
        # A library's product or convolution, and every sum of the reference, takes another order for another layout.
        as_laid_out = layout.changes_values or case.has_weight or name == "reference"
        values = layout if as_laid_out else Layout("contiguous", layout.shape, contiguous)
        of_draws = _plain_errors_of_other_draws(case, values, dtype, parameter_dtype, seed)
        allowed = {quantity: max(error, of_draws[quantity]) for quantity, error in plain_errors.items()}
        with backends.backend(name):
            actual = results_and_gradients(case, case, tensors, gradients)
        judged[name] = [compare(key, actual[key], exact[key], allowed[key], dtype) for key in actual]
    return judged


def compare(quantity: str, actual: Tensor, exact: Tensor, plain_error: float, dtype: torch.dtype) -> Accuracy:
    """Judge ``actual`` by the float64 values ``exact`` and by the plain error; ``dtype`` is that of the data."""
    actual, exact = actual.detach(), exact.detach()
    information = torch.finfo(actual.dtype)
    rounded = exact.to(actual.dtype)
    ulp = max(information.eps * _largest(exact[rounded.isfinite()]), information.smallest_normal * information.eps)
    multiple = 3 if dtype == torch.float64 else 2
    return Accuracy(quantity, error_of(actual, exact), multiple * plain_error + ulp)


def error_of(actual: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite where one is finite and the other, rounded to the same dtype, is not."""
    rounded = exact.to(actual.dtype)
    finite = rounded.isfinite()
    same_elsewhere = torch.equal(actual.isnan(), rounded.isnan()) and torch.equal(
        actual[rounded.isinf()], rounded[rounded.isinf()]
    )
    if not same_elsewhere or not actual[finite].isfinite().all():
        return math.inf
    return _largest(actual[finite].double() - exact[finite])


def draw(
    case: Case,
    layout: Layout,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The arguments of a case, and a gradient for each of its results.

    The gradients are arranged like the data, unless that would repeat values: rounding errors of equal terms add up
    where those of different terms cancel, and no draw of other values foretells them.
    """
    tensors = case.arguments(
        layout.shape, dtype, parameter_dtype=parameter_dtype, arrange=layout.arrange, device=device, seed=seed
    )
    arrange = contiguous if layout.changes_values else layout.arrange
    with torch.no_grad():
        results = case.plain_expression(tensors)
    numbers = generator("gradients", seed)
    gradients = [torch.rand(result.shape, generator=numbers, dtype=torch.float64) + 0.5 for result in results]
    return tensors, tuple(arrange(gradient.to(result)) for gradient, result in zip(gradients, results, strict=True))


def in_float64(case: Case, tensors: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """The exact results and gradients: the definition in float64, from the same rounded inputs.

    They are contiguous, because PyTorch's sums over some other layouts add one term after another, and lose more.
    """
    doubles = {name: value.detach().double().contiguous() for name, value in tensors.items()}
    return results_and_gradients(
        case, case.reference, doubles, [gradient.double().contiguous() for gradient in gradients]
    )


def results_and_gradients(
    case: Case,
    function: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    tensors: Mapping[str, Tensor],
    gradients: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The results of ``function`` by name, and the gradients of its arguments as ``"d <name>"``."""
    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    results = function(leaves)
    # The slope of relu, for one, does not depend on anything as far as autograd knows.
    attached = [(result, grad) for result, grad in zip(results, gradients, strict=True) if result.requires_grad]
    differentiated = torch.autograd.grad(
        [result for result, _ in attached], tuple(leaves.values()), [grad for _, grad in attached], allow_unused=True
    )
    found = dict(zip(case.outputs, results, strict=True))
    for (name, leaf), gradient in zip(leaves.items(), differentiated, strict=True):
        found[f"d {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def _plain_errors(
    case: Case,
    tensors: Mapping[str, Tensor],
    gradients: Sequence[Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, float]:
    """For each quantity the error of the plain expression."""
    if dtype == torch.float64:
        return dict.fromkeys(exact, 0.0)  # the other draws are in float32 and tell
    plain = results_and_gradients(case, case.plain_expression, tensors, gradients)
    errors = {}
    for quantity, actual in plain.items():
        both_finite = actual.isfinite() & exact[quantity].to(actual.dtype).isfinite()
        errors[quantity] = _largest((actual.double() - exact[quantity])[both_finite])
    return errors


@cache
def _plain_errors_of_other_draws(
    case: Case, layout: Layout, dtype: torch.dtype, parameter_dtype: torch.dtype, seed: int
) -> dict[str, float]:
    """For each quantity the largest plain error of some draws, on the CPU."""
    if dtype == torch.float64:
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        in_float32 = _plain_errors_of_other_draws(case, layout, torch.float32, torch.float32, seed)
        return {quantity: scale * error for quantity, error in in_float32.items()}
    # A few elements tell less about their errors than many; drawing them again costs little.
    draws = _DRAWS if math.prod(layout.shape) > 100 else 4 * _DRAWS
    largest: dict[str, float] = {}
    for other in range(seed + 1, seed + 1 + draws):
        tensors, gradients = draw(case, layout, dtype, parameter_dtype, "cpu", other)
        exact = in_float64(case, tensors, gradients)
        for quantity, error in _plain_errors(case, tensors, gradients, exact, dtype).items():
            largest[quantity] = max(error, largest.get(quantity, 0.0))
    return largest


def _largest(values: Tensor) -> float:
    return values.detach().abs().max().item() if values.numel() else 0.0

"""Helpers of the tests; the cases themselves are in chainzrule_kernels.testing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chainzrule_kernels.testing.cases import CASES, Case, generator

NAMESPACE = "chainzrule_kernels"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REPRESENTATIVE = tuple(case for case in CASES if case.representative)
# One case for each op, with as many arguments and results as it can have.
FULLEST = tuple(
    {case.op: case for case in sorted(REPRESENTATIVE, key=lambda c: (len(c.tensors), len(c.outputs)))}.values()
)
# The activations by kind, as PyTorch has them.
TORCH_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "mish": F.mish,
}


def each(cases: Sequence[Case]) -> Callable[..., Any]:
    """Parametrise a test over cases."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def each_dtype(dtypes: Sequence[torch.dtype] = DTYPES) -> Callable[..., Any]:
    """Parametrise a test over dtypes."""
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


def is_linear(case: Case) -> bool:
    """Whether the op contains a matrix product or a convolution, which is the library's."""
    return case.has_weight


def sums_as_memory_lies(case: Case) -> bool:
    """Whether another arrangement of the data in memory may be summed in another order."""
    keeps_channels_innermost = "_spatial_" in case.op or (case.op == "polynomial" and "shared" in case.form)
    return is_linear(case) or keeps_channels_innermost


def gradients_for(results: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """A random gradient for each result."""
    numbers = generator("gradients", seed)
    return [torch.randn(result.shape, generator=numbers, dtype=torch.float64).to(result) for result in results]


def differentiate(
    function: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    tensors: Mapping[str, Tensor],
    gradients: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The results, detached, followed by the gradient of every tensor argument."""
    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    results = function(leaves)
    gradients = gradients_for(results) if gradients is None else gradients
    attached = [(result, grad) for result, grad in zip(results, gradients, strict=True) if result.requires_grad]
    found = torch.autograd.grad(
        [result for result, _ in attached],
        tuple(leaves.values()),
        [grad for _, grad in attached],
        materialize_grads=True,
    )
    return [*(result.detach() for result in results), *found]


def scalar(results: Sequence[Tensor]) -> Tensor:
    """A loss that depends on every result in a nonlinear way."""
    return sum((result * 1.3 + 0.1).sin().sum() for result in results)


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], **tolerance: float) -> None:
    """Equal shapes, dtypes and, within the tolerance of torch.testing, values."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, **tolerance)


def assert_bitwise(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal bits."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert torch.equal(_bits(one), _bits(other))


def _bits(values: Tensor) -> Tensor:
    return values.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


class Recorder(TorchDispatchMode):
    """Notes every call of an operator that reaches a kernel: the operator, its arguments, its results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, results))
        return results

    @property
    def own_calls(self) -> list[tuple[Any, tuple[Any, ...], Any]]:
        """The calls of this package's operators."""
        return [call for call in self.calls if call[0].namespace == NAMESPACE]


def registered_operators() -> set[str]:
    """The names of every operator that this package has registered, but for those that only its kernels call."""
    names = torch._C._dispatch_get_all_op_names()
    own = {name.removeprefix(f"{NAMESPACE}::") for name in names if name.startswith(f"{NAMESPACE}::")}
    return {name for name in own if not name.startswith("_")}

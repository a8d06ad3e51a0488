"""Helpers of the tests; the cases themselves are in chainzrule_kernels.testing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chainzrule_kernels.functions import Activation
from chainzrule_kernels.ops._convolution import geometry, with_uneven_padding
from chainzrule_kernels.ops.convolved_activation_dreg import definition as convolved_definition
from chainzrule_kernels.ops.convolved_activation_dreg.op import operators as convolved_operators
from chainzrule_kernels.ops.squared_weights.op import numbers as windows_on
from chainzrule_kernels.testing.cases import CASES, MAPS, Case, Shape, TensorArgument, generator

NAMESPACE = "chainzrule_kernels"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REPRESENTATIVE = tuple(case for case in CASES if case.representative)
# One case for each op, with as many arguments and results as it can have.
FULLEST = tuple(
    {case.op: case for case in sorted(REPRESENTATIVE, key=lambda c: (len(c.tensors), len(c.outputs)))}.values()
)
CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
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


class ConvolvedCase(Case):
    """The activation behind a convolution, which is an operator without a public function."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return _convolved(convolved_operators.forward, **tensors, **self.constants)

    def reference(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return _convolved(convolved_definition.convolved_activation_dreg, **tensors, **self.constants)


def convolved_case(
    kind: str,
    *,
    factor: bool = False,
    channels: int = 2,
    window: Sequence[int] = (3, 2),
    size: Sequence[int] | None = None,
    stride: Any = 1,
    padding: Any = "same",
    dilation: Any = 1,
) -> ConvolvedCase:
    """A case of windows of so many ``channels`` on an image of ``size``, or of that of its result."""

    def weight_shape(z: Shape) -> Shape:
        return (_maps(z, window)[1], channels, *window)

    tensors = [
        TensorArgument("z", lambda z: _maps(z, window), MAPS.draw, is_data=True),
        TensorArgument("weight", weight_shape, _normal),
        *([TensorArgument("factor", lambda z: (_maps(z, window)[1],), _positive)] if factor else []),
    ]
    where = geometry(tuple(window), stride, padding, dilation)
    constants = {"kind": kind, "size": None if size is None else tuple(size), "where": where}
    words = f"{kind}, {'x'.join(map(str, window))}{', factor' if factor else ''}"
    return ConvolvedCase(
        "convolved_activation_dreg", words, tuple(tensors), constants, ("y", "jac_sq"), _plain_convolved, True
    )


def _maps(shape: Shape, window: Sequence[int]) -> Shape:
    """The shape itself, or with sizes of 4 behind it where it has none for a dimension of the window."""
    shape = shape if len(shape) > 1 else (1, *shape)
    return (*shape, *(4,) * max(0, 2 + len(window) - len(shape)))


def _normal(shape: Shape, numbers: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=numbers, dtype=torch.float64)


def _positive(shape: Shape, numbers: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=numbers, dtype=torch.float64) + 0.1


def _convolved(
    function: Callable[..., Any],
    z: Tensor,
    weight: Tensor,
    factor: Tensor | None = None,
    *,
    kind: str,
    size: Any,
    where: Any,
) -> tuple[Tensor, ...]:
    return function(z, weight, factor, *windows_on(tuple(z.shape[2:]) if size is None else size, where), kind)


def _plain_convolved(arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """With the convolution of ones for the taps inside the image."""
    z, where = arguments["z"], arguments["where"]
    weight = arguments["weight"].to(z.dtype)
    taps = weight.square().sum(1, keepdim=True)
    if where.padded:
        ones = with_uneven_padding(z.new_ones(1, *(arguments["size"] or z.shape[2:])), where)
        taps = CONVOLUTIONS[len(where.stride)](ones, taps, None, where.stride, where.even_padding, where.dilation)
    else:
        taps = taps.sum(tuple(range(1, taps.dim()))).view(-1, *(1,) * (z.dim() - 2))
    if "factor" in arguments:
        taps = taps * arguments["factor"].to(z.dtype).view(-1, *(1,) * (z.dim() - 2))
    value, slope = Activation(arguments["kind"]).derivatives(z, 1)
    sums = torch.float64 if z.dtype == torch.float64 else torch.float32
    return value, (slope.square() * taps).flatten(1).sum(1, dtype=sums)


CONVOLVED = (convolved_case("relu"), convolved_case("mish", factor=True), convolved_case("silu", padding=0))
"""The operators that have no public function, as :data:`REPRESENTATIVE` has those of the others."""


def registered_operators() -> set[str]:
    """The names of every operator that this package has registered, but for those that only its kernels call."""
    names = torch._C._dispatch_get_all_op_names()
    own = {name.removeprefix(f"{NAMESPACE}::") for name in names if name.startswith(f"{NAMESPACE}::")}
    return {name for name in own if not name.startswith("_")}

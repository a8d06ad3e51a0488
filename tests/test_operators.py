"""The registered operators as PyTorch sees them: opcheck, fakes, what they save, what they leave alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from shared import (
    CASES,
    CONVOLVED,
    DTYPES,
    REPRESENTATIVE,
    Recorder,
    differentiate,
    each,
    each_dtype,
    is_linear,
    registered_operators,
    scalar,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import chainzrule_kernels as ck
from chainzrule_kernels.functions import SAME_DERIVATIVES_AT_VALUE
from chainzrule_kernels.testing.cases import Case
from chainzrule_kernels.testing.layouts import LAYOUTS, Layout

pytestmark = pytest.mark.usefixtures("target")

OPERATED = (*REPRESENTATIVE, *CONVOLVED)
OPERATOR_LAYOUTS = [layout for layout in LAYOUTS if layout.name not in ("long rows", "many rows")]
IMAGE = Layout("channels_last", (2, 3, 4, 5), lambda values: _channels_last(values))


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


def _recorded(case: Case, layout: Layout, device: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Every call of this package's operators in a forward and a backward."""
    tensors = case.arguments(layout.shape, dtype, arrange=layout.arrange, device=device)
    with Recorder() as recorder:
        differentiate(case, tensors)
    return recorder.own_calls


def test_the_cases_reach_every_registered_operator(device: str) -> None:
    reached = {call[0].overloadpacket.__name__ for case in OPERATED for call in _recorded(case, LAYOUTS[0], device)}
    # On the CPU the linear ops are the library's product and the operator of the pass behind it.
    of_gpus = set() if device == "cuda" else {"linear_polynomial_dreg", "linear_activation_dreg"}
    assert reached == registered_operators() - of_gpus


@each(OPERATED)
def test_opcheck(case: Case, device: str) -> None:
    layout = Layout("small", (2, 3), LAYOUTS[0].arrange)
    for operator, arguments, _ in _recorded(case, layout, device, torch.float64):
        leaves = tree_map(
            lambda value: value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value, arguments
        )
        torch.library.opcheck(operator, leaves)


@pytest.mark.parametrize("layout", [*OPERATOR_LAYOUTS, IMAGE], ids=lambda layout: layout.name)
@each(OPERATED)
def test_r05_fakes_have_the_shape_dtype_and_strides_of_the_real_results(
    case: Case, layout: Layout, device: str
) -> None:
    calls = _recorded(case, layout, device)
    assert calls
    for operator, arguments, real in calls:
        with FakeTensorMode() as mode:
            fake_arguments = tree_map(
                lambda value: mode.from_tensor(value) if isinstance(value, Tensor) else value, arguments
            )
            fake = operator(*fake_arguments)
        for one, other in zip(tree_leaves(fake), tree_leaves(real), strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            assert one.device == other.device
            assert one.stride() == other.stride()


@each_dtype()
@each(REPRESENTATIVE)
def test_results_are_contiguous_and_of_the_documented_dtypes(case: Case, dtype: torch.dtype, device: str) -> None:
    tensors = case.arguments((4, 3), dtype, parameter_dtype=torch.float32, device=device)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for name, result in zip(case.outputs, case(tensors), strict=True):
        assert result.is_contiguous()
        assert result.dtype == (sums if name.endswith("_sq") else dtype)
        assert result.device == tensors[next(iter(tensors))].device


@each(OPERATED)
def test_r15_nothing_that_the_caller_can_see_changes(case: Case, device: str) -> None:
    tensors = case.arguments((64, 33), device=device, requires_grad=True)
    before = {name: value.detach().clone() for name, value in tensors.items()}
    results = case(tensors)
    gradients = [torch.randn_like(result) for result in results if result.requires_grad]
    gradients_before = [gradient.clone() for gradient in gradients]
    kept = [result.detach().clone() for result in results]
    torch.autograd.backward([result for result in results if result.requires_grad], gradients, retain_graph=True)
    torch.autograd.grad(scalar(results), list(tensors.values()), create_graph=True)
    for name, value in tensors.items():
        assert torch.equal(value, before[name])
        assert value._version == 0
    for gradient, expected in zip(gradients, gradients_before, strict=True):
        assert torch.equal(gradient, expected)
        assert gradient._version == 0
    for result, expected in zip(results, kept, strict=True):
        assert torch.equal(result, expected)


@each(OPERATED)
def test_results_and_gradients_are_not_views_of_the_arguments(case: Case, device: str) -> None:
    tensors = case.arguments((8, 3), device=device)
    storages = {value.untyped_storage().data_ptr() for value in tensors.values()}
    found = differentiate(case, tensors)
    own = [value.untyped_storage().data_ptr() for value in found]
    assert storages.isdisjoint(own)
    assert len(set(own)) == len(own)


@each(CASES)
def test_training_keeps_one_tensor_of_the_size_of_the_activations(case: Case, device: str) -> None:
    rows = 512
    tensors = case.arguments((rows, 16), device=device, requires_grad=True)
    given = {value.untyped_storage().data_ptr() for value in tensors.values()}
    saved: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        results = case(tensors)
    new = {pointer: size for pointer, size in saved.items() if pointer not in given}
    activations = [size for size in new.values() if size >= rows * 4]
    value = results[0].untyped_storage()
    if case.constants.get("kind") in SAME_DERIVATIVES_AT_VALUE:
        assert saved[value.data_ptr()] == value.nbytes()  # y, which what comes next keeps anyway
        assert len(activations) == 1
        assert tensors[next(iter(tensors))].untyped_storage().data_ptr() not in saved or is_linear(case)  # and not z
    elif is_linear(case):
        assert activations == [value.nbytes()]  # z
    else:
        assert new == {}  # z is the caller's own


@each([case for case in REPRESENTATIVE if case.constants.get("kind") in SAME_DERIVATIVES_AT_VALUE])
def test_derivatives_taken_at_the_value_are_those_at_z(case: Case, device: str) -> None:
    tensors = case.arguments((8, 3), device=device)
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45], device=device)
    first = tensors[next(iter(tensors))]
    if not is_linear(case):
        first.flatten()[: special.numel()].copy_(special)
    found = differentiate(case, tensors)
    with ck.backend("reference"):
        expected = differentiate(case, tensors)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, equal_nan=True)


@each_dtype(DTYPES)
@each(REPRESENTATIVE)
def test_no_work_for_gradients_that_nobody_asked_for(case: Case, dtype: torch.dtype, device: str) -> None:
    # Under no_grad nothing is saved, and a result of it carries no graph.
    tensors = case.arguments((4, 3), dtype, device=device, requires_grad=True)
    with torch.no_grad():
        assert not any(result.requires_grad for result in case(tensors))
    with torch.inference_mode():
        assert not any(result.requires_grad for result in case(tensors))


@each([case for case in REPRESENTATIVE if not is_linear(case)])
def test_the_backward_computes_only_what_is_needed(case: Case, device: str) -> None:
    tensors = case.arguments((4, 3), device=device)
    first = next(iter(tensors))
    tensors[first].requires_grad_()
    results = case(tensors)
    with Recorder() as recorder:
        scalar(results).backward()
    ((_, _, gradients),) = recorder.own_calls
    wanted = [gradient for gradient in tree_leaves(gradients) if gradient.numel()]
    assert [gradient.shape for gradient in wanted] == [tensors[first].shape]

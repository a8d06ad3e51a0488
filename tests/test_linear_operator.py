"""The operator behind the linear ops on a GPU: its derivatives, what it saves, and the rule for its epilogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chainzrule_kernels.ops import _launch, _linear_operator
from chainzrule_kernels.ops.linear_activation_dreg.op import operator as linear_activation
from chainzrule_kernels.ops.linear_polynomial_dreg.op import operator as linear_polynomial

FORMS = ["shared", "per channel", "silu"]


def operator_of(form: str) -> Any:
    return linear_activation if form == "silu" else linear_polynomial


def arguments(form: str, keep_z: bool, bias: bool = True, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Of a layer from 3 to 4 features, on a batch of 2 x 2."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    function: Any = "silu" if form == "silu" else draw(4, 4) if form == "per channel" else draw(4)
    return [draw(2, 2, 3), draw(4, 3), draw(4) if bias else None, draw(4), function, keep_z]


def differentiable(form: str, inputs: list[Any]) -> tuple[Any, list[Tensor]]:
    """The operator as a function of its tensors, and those."""
    places = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(inputs)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        results = operator_of(form)(*filled)
        return results if inputs[-1] else results[:2]

    return function, [inputs[place] for place in places]


@pytest.mark.parametrize("keep_z", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_all_derivatives(form: str, keep_z: bool) -> None:
    function, tensors = differentiable(form, arguments(form, keep_z))
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_equals_its_definition(form: str, bias: bool) -> None:
    inputs = arguments(form, True, bias)
    function, tensors = differentiable(form, inputs)
    results, expected = function(*tensors), operator_of(form).definition(*inputs)
    torch.testing.assert_close(results, expected)
    # One gradient alone, so that the others are absent.
    for one, other in zip(results, expected, strict=True):
        found = torch.autograd.grad(one.sum(), tensors, retain_graph=True, allow_unused=True)
        exact = torch.autograd.grad(other.sum(), tensors, retain_graph=True, allow_unused=True)
        for gradient, right in zip(found, exact, strict=True):
            # An absent gradient and a gradient of zeros say the same.
            if gradient is None or right is None:
                assert all(value is None or not value.any() for value in (gradient, right))
            else:
                torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    for keep_z in (True, False):
        torch.library.opcheck(operator_of(form).overload, tuple(arguments(form, keep_z)))


@pytest.mark.parametrize("form", FORMS)
def test_transforms(form: str) -> None:
    function, tensors = differentiable(form, arguments(form, True))
    x, *rest = (tensor.detach() for tensor in tensors)
    mapped = torch.vmap(lambda row: function(row, *rest))(x)
    torch.testing.assert_close(mapped, function(x, *rest))
    forward = torch.func.jacfwd(lambda value: function(value, *rest)[1])(x)
    torch.testing.assert_close(forward, torch.func.jacrev(lambda value: function(value, *rest)[1])(x))


def test_z_alone_is_saved_beside_the_arguments() -> None:
    inputs = arguments("shared", True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        _, _, z = linear_polynomial(*inputs)
    own = {tensor.data_ptr() for tensor in inputs if isinstance(tensor, Tensor)}
    assert [tensor.data_ptr() for tensor in saved if tensor.data_ptr() not in own] == [z.data_ptr()]


def test_without_a_backward_there_is_no_z() -> None:
    x, weight, bias, *_ = arguments("shared", True)
    assert _linear_operator.keeps_z(x, weight, bias)
    assert not _linear_operator.keeps_z(x.detach(), weight.detach(), None)
    with torch.no_grad():
        assert not _linear_operator.keeps_z(x, weight, bias)
        assert linear_polynomial(*arguments("shared", False))[2].numel() == 0


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operands_are_those_of_the_library_under_autocast(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = torch.ones(2, 3, dtype=x_dtype), torch.ones(4, 3, dtype=weight_dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            operands = _linear_operator.operands(x, weight, None)
            assert {operand.dtype for operand in operands[:2]} == {F.linear(x, weight.to(x.dtype)).dtype}


# ---- the rule --------------------------------------------------------------------------------------------------------


def reason(columns: int = 1024, inner: int = 512, **changes: Any) -> str | None:
    known = {"itemsize": 2, "tensor_cores": True, "degree_per_channel": 0, "keeps_z": True}
    return _launch.why_no_epilogue(columns, inner, **{**known, **changes})


def test_the_epilogue_is_for_short_products() -> None:
    assert reason(inner=512) is None
    assert "512" in str(reason(inner=520))
    # Without a backward twice as many bytes are saved, and so the product may be twice as long.
    assert reason(inner=1024, keeps_z=False) is None
    assert reason(inner=1032, keeps_z=False) is not None
    # TF32: elements twice as large, products half as fast.
    assert reason(inner=512, itemsize=4) is None
    assert reason(inner=516, itemsize=4) is not None


def test_what_the_epilogue_cannot_take() -> None:
    assert "tensor cores" in str(reason(tensor_cores=False))
    assert "8 features" in str(reason(inner=100))
    assert "8 features" in str(reason(columns=1001))
    assert reason(degree_per_channel=4) is None
    assert "degree" in str(reason(degree_per_channel=5))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_the_product_fit_into_shared_memory(architecture: str, itemsize: int) -> None:
    room = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}.get(architecture, 99) * 1024
    tiles = _launch.product_tiles(itemsize, architecture)
    for tile in tiles:
        assert tile.stages * (tile.rows + tile.columns) * tile.inner * itemsize <= room
    for rows in (1, 64, 100, 5000, 1 << 20):
        for columns in (8, 1000, 65536):
            plan = _launch.product_plan(rows, columns, itemsize, architecture)
            assert plan.tile in tiles
            assert (plan.splits - 1) * plan.tile.columns < columns <= plan.splits * plan.tile.columns
            assert (plan.row_programs - 1) * plan.tile.rows < rows <= plan.row_programs * plan.tile.rows

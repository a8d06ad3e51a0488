"""The squared weights in front of an activation: the operators behind the row norms and the taps inside an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared import assert_bitwise
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import chainzrule_kernels as ck
from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.ops._convolution import Geometry, geometry, with_uneven_padding
from chainzrule_kernels.ops.squared_weights import definition, op

GEOMETRIES = {
    "padding on all sides": ((5, 6), (3, 3), (1, 1), 1, (1, 1)),
    "stride": ((12, 10), (7, 7), (2, 3), 3, (1, 1)),
    "dilation": ((7, 9), (3, 2), (1, 1), "same", (2, 1)),
    "uneven padding": ((4, 4), (3, 5), (1, 1), ((0, 2), (3, 1)), (1, 1)),
    "a tap that is never inside": ((2, 3), (5, 3), (1, 1), (6, 1), (3, 1)),
    "no padding": ((5, 6), (3, 2), (1, 1), 0, (1, 1)),
    "one dimension": ((11,), (4,), (1,), 2, (3,)),
    "three dimensions": ((4, 5, 6), (2, 3, 4), (1, 2, 1), 1, (1, 1, 1)),
}
CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _draw(name: str, dtype: torch.dtype, channels: int = 3) -> tuple[Tensor, Tensor, Geometry]:
    torch.manual_seed(0)
    size, window, *where = GEOMETRIES[name]
    weight = torch.randn(4, channels, *window, dtype=dtype, requires_grad=True)
    return weight, torch.ones(channels, *size, dtype=dtype), geometry(window, *where)


def _gradient(result: Tensor, weight: Tensor) -> Tensor:
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(result, weight, torch.randn_like(result), retain_graph=True)
    return gradient


@pytest.mark.parametrize("name", GEOMETRIES)
def test_they_are_those_of_the_convolution_of_ones(name: str) -> None:
    weight, ones, where = _draw(name, torch.float64)
    padded = with_uneven_padding(ones, where)
    convolution = CONVOLUTIONS[len(where.stride)]
    expected = convolution(padded, weight.square(), None, where.stride, where.even_padding, where.dilation)
    if not where.padded:
        assert torch.equal(expected, expected[:, :1, :1].expand_as(expected))
        expected = expected[:, 0, 0]
    for squared_taps in (op.squared_taps, definition.squared_taps):
        found = squared_taps(weight, ones, where)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(_gradient(found, weight), _gradient(expected, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 33, 700])
@pytest.mark.parametrize("name", ["stride", "no padding"])
def test_they_are_as_accurate_as_plain_pytorch(name: str, channels: int, dtype: torch.dtype) -> None:
    # Some whole blocks of a row and a part of one; sums long enough to lose digits.
    weight, ones, where = _draw(name, dtype, channels)
    exact_weight = weight.detach().double().requires_grad_()
    exact = definition.squared_taps(exact_weight, ones.double(), where)
    found, plain = op.squared_taps(weight, ones, where), definition.squared_taps(weight, ones, where)
    assert found.dtype == compute_dtype(weight)
    _check_error(found, plain, exact)
    gradients = [_gradient(result, of) for result, of in ((found, weight), (plain, weight), (exact, exact_weight))]
    assert gradients[0].dtype == dtype
    _check_error(*gradients)


def _check_error(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain PyTorch, plus one unit in the last place (SPEC 4)."""
    errors = [(value.double() - exact).abs() for value in (found, plain)]
    unit = torch.finfo(found.dtype).eps * exact.abs()
    assert (errors[0] <= 2 * errors[1] + unit).all()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_derivative(name: str) -> None:
    weight, ones, where = _draw(name, torch.float64, 2)

    def function(weight: Tensor) -> Tensor:
        return op.squared_taps(weight, ones, where)

    gradcheck(function, weight, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    gradgradcheck(function, weight, check_fwd_over_rev=True, check_rev_over_rev=True)
    many = torch.randn(3, *weight.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(function)(many), torch.stack([function(one) for one in many]))


@pytest.mark.parametrize("name", ["stride", "no padding"])
def test_opcheck(name: str) -> None:
    weight, ones, where = _draw(name, torch.float32)
    numbers: list[Any] = [[], [], [], []]
    if where.padded:
        padding = [size for pair in where.padding for size in pair]
        numbers = [list(ones.shape[1:]), list(where.stride), padding, list(where.dilation)]
    operators = torch.ops.chainzrule_kernels
    torch.library.opcheck(operators.squared_taps.default, (weight, *numbers))
    grad = torch.randn_like(operators.squared_taps(weight, *numbers)).requires_grad_()
    torch.library.opcheck(operators.squared_taps_backward.default, (weight, grad, *numbers))


def test_any_layout() -> None:
    weight, ones, where = _draw("stride", torch.float32)
    expected = op.squared_taps(weight, ones, where)
    spread = torch.empty(8, 3, 7, 14)[::2, :, :, ::2].copy_(weight.detach()).requires_grad_()
    innermost = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    everywhere = weight.detach()[:, :1].expand(-1, 3, -1, -1).requires_grad_()
    for other in (spread, innermost):
        found = op.squared_taps(other, ones, where)
        assert_bitwise(
            [found, _gradient(found, other)], [expected, _gradient(op.squared_taps(weight, ones, where), weight)]
        )
    torch.testing.assert_close(
        op.squared_taps(everywhere, ones, where), op.squared_taps(everywhere.contiguous(), ones, where)
    )
    # .sum().backward() sends a gradient of stride 0.
    (from_sum,) = torch.autograd.grad(expected.sum(), weight)
    ones_like = torch.ones_like(op.squared_taps(weight, ones, where))
    torch.testing.assert_close(
        from_sum, torch.autograd.grad(op.squared_taps(weight, ones, where), weight, ones_like)[0]
    )


@pytest.mark.parametrize("shape", [(0, 3, 7, 7), (4, 0, 7, 7)], ids=str)
def test_empty_weights(shape: tuple[int, ...]) -> None:
    _, ones, where = _draw("stride", torch.float32)
    weight = torch.empty(shape, requires_grad=True)
    found = op.squared_taps(weight, ones, where)
    assert torch.equal(found, torch.zeros(shape[0], *where.out_size(ones.shape[1:], shape[2:])))
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == shape


@pytest.mark.usefixtures("threads")
def test_they_have_the_same_bits_for_any_number_of_threads() -> None:
    weight, ones, where = _draw("padding on all sides", torch.float32, 900)
    rows, row = torch.randn(300, 1001, requires_grad=True), torch.randn(1, 40000)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        taps, norms = op.squared_taps(weight, ones, where), op.squared_row_norms(rows, rows)
        gradients = [_gradient(taps, weight), _gradient(norms, rows)]
        results.append([taps, norms, op.squared_row_norms(row, row), *gradients])
    for other in results[1:]:
        assert_bitwise(results[0], other)


@pytest.mark.parametrize("shape", [(5, 7), (0, 3), (300, 1001), (1, 70000)], ids=str)
def test_row_norms_of_small_and_large_weights(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, requires_grad=True)
    found, plain = op.squared_row_norms(weight, weight), definition.squared_row_norms(weight, weight)
    exact_weight = weight.detach().double().requires_grad_()
    exact = definition.squared_row_norms(exact_weight, exact_weight)
    _check_error(found, plain, exact)
    _check_error(_gradient(found, weight), _gradient(plain, weight), _gradient(exact, exact_weight))


def test_the_dtype_is_that_in_which_an_op_on_the_input_computes() -> None:
    weight = torch.randn(3, 5)
    wide, half = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.bfloat16)
    assert op.squared_row_norms(weight, wide).dtype == torch.float64
    assert op.squared_row_norms(weight.double(), half).dtype == torch.float32
    assert op.squared_row_norms(weight.bfloat16(), half).dtype == torch.float32


def test_the_reference_and_the_compiler_get_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, ones, where = _draw("stride", torch.float32)
    large = torch.randn(300, 1001)
    expected = op.squared_taps(weight, ones, where), op.squared_row_norms(large, large)

    def both() -> tuple[Tensor, Tensor]:
        return op.squared_taps(weight, ones, where), op.squared_row_norms(large, large)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    seen: list[str] = []
    monkeypatch.setattr(op.operators.forward, "overload", lambda *inputs: seen.append("called"))
    monkeypatch.setattr(op.operators.forward, "apply_eagerly", lambda *inputs: seen.append("called"))
    with ck.backend("reference"):
        torch.testing.assert_close(both(), expected)
    torch.testing.assert_close(compiled(), expected)
    assert not seen


def test_they_are_summed_in_float32_under_autocast() -> None:
    # The definition by matrix products, which autocast would round.
    weight, ones, where = _draw("padding on all sides", torch.float32)
    for squared_taps in (op.squared_taps, definition.squared_taps):
        with torch.autocast("cpu", torch.bfloat16):
            found = squared_taps(weight, ones, where)
        assert torch.equal(found, squared_taps(weight, ones, where))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (([5], [1, 1], [1, 1, 1, 1], [1, 1]), "does not fit the sizes"),
        (([5, 5], [0, 1], [1, 1, 1, 1], [1, 1]), "stride must be positive"),
        (([1, 1], [1, 1], [0, 0, 0, 0], [1, 1]), "does not fit the image"),
    ],
)
def test_the_kernel_refuses_numbers_that_do_not_fit(numbers: Any, message: str, compiled: bool) -> None:
    if not compiled:
        pytest.skip("the definition runs: the compiled CPU module is not there")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.chainzrule_kernels.squared_taps(torch.ones(2, 3, 3, 3), *numbers)

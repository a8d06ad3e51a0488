"""Hypothesis over ops, shapes, strides, dtypes and degrees; NaN and infinity."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shared import (
    CASES,
    DTYPES,
    FULLEST,
    TORCH_ACTIVATIONS,
    assert_bitwise,
    assert_same,
    differentiate,
    each,
    is_linear,
    sums_as_memory_lies,
)
from torch import Tensor

import chainzrule_kernels as ck
from chainzrule_kernels.testing.accuracy import error_of
from chainzrule_kernels.testing.cases import Case

pytestmark = pytest.mark.usefixtures("target")

# The fixture `target` puts one backend in force for all examples of a test: it need not be set up for each.
thorough = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Up to four dimensions; the channels now and then beyond every vector width."""
    leading = draw(st.lists(st.integers(0, 5), max_size=3))
    return (*leading, draw(st.one_of(st.integers(0, 9), st.integers(10, 140))))


@st.composite
def arrangements(draw: st.DrawFn) -> object:
    """A function that puts values into random strides: dimensions permuted, stepped over, offset, perhaps expanded."""
    order_seed = draw(st.integers(0, 23))
    step = draw(st.integers(1, 3))
    offset = draw(st.integers(0, 3))
    expand = draw(st.sampled_from([None, None, 0, -1]))

    def arrange(values: Tensor) -> Tensor:
        if values.dim() == 0:
            return values
        generator = torch.Generator().manual_seed(order_seed)
        order = torch.randperm(values.dim(), generator=generator).tolist()
        sizes = [values.shape[dimension] for dimension in order]
        buffer = torch.full((offset + math.prod(sizes) * step,), math.nan, dtype=values.dtype, device=values.device)
        strides, stride = [0] * values.dim(), step
        for position in reversed(range(values.dim())):
            strides[order[position]] = stride
            stride *= max(1, sizes[position])
        view = buffer.as_strided(values.shape, strides, offset) if values.numel() else values
        view.copy_(values)
        if expand is not None and values.shape[expand] > 0:
            view = view.narrow(expand, 0, 1).expand_as(values)
        return view

    return arrange


@thorough
@given(
    case=st.sampled_from(CASES),
    shape=shapes(),
    arrange=arrangements(),
    dtype=st.sampled_from(DTYPES),
    parameter_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@example(CASES[0], (0,), lambda values: values, torch.float32, torch.float32, 0)
def test_any_shape_stride_dtype_and_degree(
    device: str,
    case: Case,
    shape: tuple[int, ...],
    arrange: object,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    seed: int,
) -> None:
    tensors = case.arguments(
        shape, dtype, parameter_dtype=parameter_dtype, arrange=arrange, device=device, seed=seed, parameter_seed=seed
    )
    copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    found = differentiate(case, tensors)
    expected = differentiate(case.reference, copies)
    eps = max(torch.finfo(value.dtype).eps for value in tensors.values())
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        # The sums may cancel: what is compared is the size of their terms, bounded by that of the whole tensor.
        scale = max(1.0, other.double().abs().max().item() if other.numel() else 0.0)
        assert error_of(one, other.double()) <= 200 * eps * scale * math.sqrt(
            max(1, tensors[next(iter(tensors))].numel())
        )
    for name, value in tensors.items():
        assert torch.equal(value, copies[name])


@thorough
@given(
    case=st.sampled_from([case for case in CASES if not sums_as_memory_lies(case)]),
    shape=shapes(),
    arrange=arrangements(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_strides_change_no_bit(
    device: str, compiled: bool, case: Case, shape: tuple[int, ...], arrange: object, dtype: torch.dtype, seed: int
) -> None:
    tensors = case.arguments(shape, dtype, arrange=arrange, device=device, seed=seed)
    copies = {name: value.contiguous() for name, value in tensors.items()}
    found, expected = differentiate(case, tensors), differentiate(case, copies)
    if compiled:
        assert_bitwise(found, expected)
    else:
        eps = torch.finfo(dtype).eps
        assert_same(found, expected, rtol=100 * eps, atol=1e4 * eps)


# ---- NaN and infinity -----------------------------------------------------------------------------------------------

SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30)


def _pattern(values: Tensor) -> Tensor:
    """0 where finite, 1 and -1 where infinite, 2 where NaN."""
    return torch.where(values.isnan(), 2.0, torch.where(values.isinf(), values.sign().float(), 0.0))


def _data_with_specials(case: Case, dtype: torch.dtype, device: str, position: int) -> tuple[dict[str, Tensor], Tensor]:
    """Every other row has one special element in its channel ``position``; and those rows by number."""
    tensors = case.arguments((2 * len(SPECIAL) + 1, 21), dtype, device=device)
    rows = torch.arange(1, 2 * len(SPECIAL), 2)
    for row, special in zip(rows.tolist(), SPECIAL, strict=True):
        tensors[case.tensors[0].name][row, position] = special
    return tensors, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each([case for case in CASES if not is_linear(case)])
def test_nan_and_infinity_go_through_as_in_the_definition(case: Case, dtype: torch.dtype, device: str) -> None:
    for position in (0, 20):  # in a vector, and in what is left behind the last whole one
        tensors, _ = _data_with_specials(case, dtype, device, position)
        for one, other in zip(case(tensors), case.reference(tensors), strict=True):
            assert torch.equal(_pattern(one), _pattern(other)), position


@each([case for case in CASES if not is_linear(case)])
def test_a_special_element_reaches_no_other_gradient(case: Case, device: str) -> None:
    # In its own row and channel the gradient may be whatever the formulas give; elsewhere it stays as it was.
    tensors, rows = _data_with_specials(case, torch.float32, device, 0)
    found = differentiate(case, tensors)
    gradient_of_z = found[len(case.outputs)]
    shape = (2 * len(SPECIAL) + 1, 21)
    untouched = differentiate(case, case.arguments(shape, device=device))[len(case.outputs)]
    assert torch.equal(gradient_of_z[::2], untouched[::2])
    for row, special in zip(rows.tolist(), SPECIAL, strict=True):
        if math.isnan(special):
            assert gradient_of_z[row, 0].isnan() or case.constants.get("kind") == "relu" or "degree 1," in case.form


@pytest.mark.parametrize("special", SPECIAL, ids=str)
@pytest.mark.parametrize("kind", ck.ACTIVATION_KINDS)
def test_special_values_of_activations_are_those_of_pytorch(kind: str, special: float, device: str) -> None:
    z = torch.full((2, 19), special, device=device)
    y, _ = ck.activation_dreg(z, kind)
    # One element of float64: PyTorch's vectorised gelu gives NaN at +inf, depending on the length of the tensor.
    expected = TORCH_ACTIVATIONS[kind](z[0, :1].double()).float().expand_as(z)
    assert torch.equal(_pattern(y), _pattern(expected))
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_nan_in_relu_reaches_the_gradient_as_in_pytorch(device: str) -> None:
    z = torch.tensor([[math.nan, 1.0, -1.0, 0.0]], device=device, requires_grad=True)
    y, _ = ck.activation_dreg(z, "relu")
    assert y[0, 0].isnan()
    (gradient,) = torch.autograd.grad(y.sum(), z)
    (expected,) = torch.autograd.grad(F.relu(z).sum(), z)
    assert torch.equal(gradient, expected)


@each([case for case in FULLEST if not is_linear(case)])
def test_a_gradient_that_did_not_arrive_is_absent_not_zero(case: Case, device: str) -> None:
    # 0 · inf would be NaN: with only y in the loss, an infinite jac_sq must not reach the gradient.
    tensors = case.arguments((2, 5), device=device, requires_grad=True)
    with torch.no_grad():
        tensors["z"][0, 0] = 1e25  # its square overflows float32, its own first power does not
    if "coeffs" in tensors:
        with torch.no_grad():
            tensors["coeffs"][2:] = 0
    (gradient,) = torch.autograd.grad(case(tensors)[0].sum(), tensors["z"])
    assert gradient.isfinite().all()

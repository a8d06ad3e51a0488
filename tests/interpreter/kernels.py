"""Every Triton kernel against the definition, in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import chainzrule_kernels as ck
from chainzrule_kernels.ops import _call_triton, _dreg_triton, _launch, _linear_triton, _tangent_triton
from chainzrule_kernels.ops.activation_dreg.op import operators as activation_dreg
from chainzrule_kernels.ops.activation_tangent.op import operators as activation_tangent
from chainzrule_kernels.ops.linear_activation_dreg.op import operator as linear_activation
from chainzrule_kernels.ops.linear_polynomial_dreg.op import operator as linear_polynomial
from chainzrule_kernels.ops.polynomial_dreg.op import operators as polynomial_dreg
from chainzrule_kernels.ops.polynomial_tangent.op import operators as polynomial_tangent
from chainzrule_kernels.testing import CASES, LAYOUTS, Case, Layout, measure
from chainzrule_kernels.testing.layouts import channels_innermost, contiguous

# The linear ops have tests of their own below; convolutions are the library's, and end in the pass over feature maps.
OWN = [case for case in CASES if not case.op.startswith(("linear_", "polynomial_conv"))]
REPRESENTATIVE = [case for case in OWN if case.representative]
BY_NAME = {case.name: case for case in CASES}


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(case: Case, layout: Layout, dtype: torch.dtype) -> None:
    """Results and gradients within the allowance; a coefficient's gradient within twice the allowance.

    The interpreter neither fuses multiplications with additions nor adds a tile's elements in a tree, as a GPU does,
    and the gradient of a coefficient is one sum over everything.
    """
    for accuracy in measure(case, layout, dtype, parameter_dtype(dtype), ["triton"])["triton"]:
        assert accuracy.used <= (2 if accuracy.quantity == "d coeffs" else 1), accuracy


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_every_case_in_float32(case: Case) -> None:
    check(case, Layout("small", (2, 3, 37), contiguous), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=lambda case: case.name)
def test_every_dtype(case: Case, dtype: torch.dtype) -> None:
    check(case, Layout("small", (3, 40), contiguous), dtype)


@pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS if layout.name not in ("contiguous", "many rows", "long rows")],
    ids=lambda layout: layout.name,
)
@pytest.mark.parametrize(
    "name",
    [
        "polynomial[degree 3, shared]",
        "polynomial_dreg[degree 3, per channel, row_sq]",
        "activation_dreg[gelu]",
        "polynomial_tangent[degree 3, per channel]",
    ],
)
def test_layouts(name: str, layout: Layout) -> None:
    check(BY_NAME[name], layout, torch.float32)


# ---- every tile ------------------------------------------------------------------------------------------------------

SEEN: dict[str, set[_launch.Tile]] = {}

# For four elements to a vector: narrow, middle and wide tiles; rows that are a whole number of vectors or not; several
# blocks of rows, several steps to a row; and a matrix that ends within a vector, and one that does not.
SHAPES = [
    (70, 40),
    (70, 37),
    (33, 64),
    (300, 3),
    (20, 72),
    (21, 75),
    (9, 323),
    (40, 300),
    (3, 2304),
    (3, 4099),
    (2, 9001),
]
# Where the channels differ there are no wide tiles, and a program for every few channels.
NO_WIDE_TILES = ("polynomial_dreg[degree 3, shared, row_sq]", "polynomial_dreg[degree 3, per channel]")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps in SEEN which kernel ran with which tile."""

    def launch(kernel: Any, plan: _launch.Plan, *arguments: Any) -> None:
        SEEN.setdefault(kernel.__name__, set()).add(plan.tile)
        _call_triton.launch(kernel, plan, *arguments)

    monkeypatch.setattr(_dreg_triton, "launch", launch)
    monkeypatch.setattr(_tangent_triton, "launch", launch)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "polynomial[degree 3, shared]",
        "polynomial_dreg[degree 3, shared]",
        "polynomial_dreg[degree 3, shared, row_sq]",
        "polynomial_dreg[degree 3, per channel]",
        "polynomial_tangent[degree 3, shared]",
        "polynomial_tangent[degree 3, per channel]",
    ],
)
def test_every_tile(name: str, shape: tuple[int, ...]) -> None:
    if name in NO_WIDE_TILES and shape[1] > 1000:
        shape = (shape[0], shape[1] % 100)
    check(BY_NAME[name], Layout("tile", shape, contiguous), torch.float32)


def test_all_tiles_were_seen() -> None:
    channel = set(_launch.channel_tiles(4, 3))
    expected = {
        "dreg_forward_kernel": {*_launch.forward_tiles(4), *_launch.flat_tiles(4)},
        "dreg_backward_kernel": {*_launch.backward_tiles(4), *_launch.flat_backward_tiles(4)},
        "dreg_channel_forward_kernel": channel,
        "dreg_channel_backward_kernel": channel,
        "tangent_forward_kernel": set(_launch.tangent_tiles(4)),
        "tangent_backward_kernel": {*_launch.tangent_backward_tiles(4), *channel},
    }
    assert expected == SEEN


@pytest.mark.parametrize("shape", [(21, 75), (3, 4099), (5, 37), (4, 72)], ids=str)
def test_nothing_is_written_beyond_an_output(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    guarded: list[Tensor] = []

    def between_guards(like: Tensor) -> Tensor:
        buffer = torch.full((like.numel() + 64,), 7.25, dtype=like.dtype)
        guarded.append(buffer)
        return buffer[32:-32].view(like.shape)

    monkeypatch.setattr(_dreg_triton, "empty_like", between_guards)
    z, coeffs = torch.randn(shape), torch.randn(4)
    results = polynomial_dreg.forward(z, None, coeffs, False, True)
    torch.testing.assert_close(results[0], ck.reference.polynomial(z, coeffs))
    polynomial_dreg.backward(z, None, coeffs, z, torch.ones(shape[0]), None, False, True, False, True)
    assert len(guarded) == 3
    for buffer in guarded:
        assert (buffer[:32] == 7.25).all()
        assert (buffer[-32:] == 7.25).all()
        assert (buffer[32:-32] != 7.25).all()


# ---- feature maps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrange", [contiguous, channels_innermost], ids=lambda arrange: arrange.__name__)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 8, 4, 4), (1, 5, 40), (9, 16, 3, 2, 5), (0, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "polynomial_spatial_dreg[degree 3, shared]",
        "polynomial_spatial_dreg[degree 3, per channel, tap_sq]",
        "polynomial_spatial_dreg[degree 3, per channel, tap_sq for each channel]",
        "activation_spatial_dreg[mish, tap_sq]",
    ],
)
def test_images(name: str, shape: tuple[int, ...], arrange: Any) -> None:
    check(BY_NAME[name], Layout("image", shape, arrange), torch.float32)


def test_a_convolution_ends_in_the_pass_over_images() -> None:
    x, weight, coeffs = torch.randn(2, 4, 6, 5), torch.randn(8, 4, 3, 3) / 6, torch.randn(4, 8)
    found = ck.polynomial_conv2d_dreg(x, weight, None, coeffs, padding=1)
    expected = ck.reference.polynomial_conv2d_dreg(x.double(), weight.double(), None, coeffs.double(), padding=1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_images_keep_their_layout() -> None:
    z = channels_innermost(torch.randn(2, 5, 3, 4)).requires_grad_()
    y, _ = ck.polynomial_spatial_dreg(z, torch.randn(4, 5), torch.rand(5, 3, 4))
    (dz,) = torch.autograd.grad(y.sum(), z)
    assert y.stride() == z.stride() == dz.stride()


# ---- the product with its epilogue -----------------------------------------------------------------------------------


@pytest.fixture
def in_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule does not matter here; the interpreter has no tensor cores, so float32 stays float32."""
    monkeypatch.setattr(_linear_triton, "why_no_epilogue", lambda *arguments: None)
    monkeypatch.setattr(_launch, "FULL_PRODUCT_TILES", 2)


# One tile and several of them, in both directions; fewer rows, columns and inner features than a tile, and more; rows
# for more than one group.
PRODUCTS = [(1, 8, 8), (5, 72, 40), (70, 200, 24), (300, 136, 64), (1200, 8, 16), (0, 8, 8)]


@pytest.mark.usefixtures("in_epilogue")
@pytest.mark.parametrize("form", ["shared", "per channel", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_product_with_epilogue(shape: tuple[int, int, int], dtype: torch.dtype, form: str) -> None:
    rows, columns, inner = shape
    x, weight, bias = torch.randn(rows, inner), torch.randn(columns, inner) / inner**0.5, torch.randn(columns)
    row_sq = weight.square().sum(1)
    coeffs = torch.randn((4, columns) if form == "per channel" else (4,))
    room, function = (linear_activation, "gelu") if form == "gelu" else (linear_polynomial, coeffs)
    inputs = (x.to(dtype), weight.to(dtype), bias.to(dtype) if columns > 8 else None, row_sq, function)
    y, jac_sq, z = room(*inputs, True)
    exact = tuple(value.double() if isinstance(value, Tensor) else value for value in inputs)
    y_exact, jac_sq_exact, z_exact = room.definition(*exact, True)
    # y comes from the sum in float32, not from the z that was stored: one rounding, not two.
    eps = {torch.float16: 2.0**-11, torch.float32: 2.0**-20, torch.float64: 2.0**-45}[dtype]
    for found, expected, rounding in (
        (y, y_exact, eps),
        (z, z_exact, eps),
        (jac_sq, jac_sq_exact, max(eps**2, 2.0**-20)),
    ):
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(found.double(), expected, rtol=1.01 * rounding, atol=2.0**-20 * scale)
    again, jac_sq_again, no_z = room(*inputs, False)
    assert torch.equal(y, again)
    assert torch.equal(jac_sq, jac_sq_again)
    assert no_z.numel() == 0


LINEAR = [case for case in CASES if case.op.startswith("linear_") and case.representative]


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_linear_ops_by_the_product_of_the_library(case: Case) -> None:
    check(case, Layout("small", (2, 3, 40), contiguous), torch.float32)


@pytest.mark.usefixtures("in_epilogue")
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_linear_ops_in_one_kernel(case: Case) -> None:
    check(case, Layout("small", (2, 3, 40), contiguous), torch.float32)


def test_explain_tells_which_of_the_two() -> None:
    x, weight, coeffs = torch.ones(2, 64), torch.ones(8, 64), torch.ones(4)
    in_float32 = ck.explain("linear_polynomial_dreg", x, weight, None, coeffs)
    assert "without tensor cores" in str(in_float32)
    in_half = ck.explain("linear_polynomial_dreg", x.half(), weight.half(), None, coeffs)
    assert "one kernel" in str(in_half)
    assert ck.explain("linear_activation_dreg", x.half(), weight.half(), None, "gelu").how == in_half.how
    assert ck.explain("polynomial", x, coeffs).how is None


# ---- gradients that did not arrive, results that are not wanted ------------------------------------------------------


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Differences then come from mistakes, not from rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("form", ["shared", "per channel", "rectified", "activation"])
@pytest.mark.usefixtures("in_float64")
def test_absent_gradients_and_unwanted_results(form: str, present: tuple[bool, ...]) -> None:
    z, row_sq = torch.randn(5, 8), torch.rand(8)
    grads = [torch.randn(5, 8), torch.randn(5), torch.randn(5, 8)]
    arrived = [grad if here else None for grad, here in zip(grads, present, strict=True)]
    for needs in itertools.product((False, True), repeat=3):
        for weight in (row_sq, None):
            if needs[1] and weight is None:
                continue
            if form == "activation":
                operator, inputs = activation_dreg.backward, (z, weight, *arrived, "gelu", *needs[:2])
            else:
                coeffs = torch.randn(4, 8) if form == "per channel" else torch.randn(4)
                operator, inputs = polynomial_dreg.backward, (z, weight, coeffs, *arrived, form == "rectified", *needs)
            torch.testing.assert_close(operator(*inputs), operator.definition(*inputs))


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("tangents", [0, 2])
@pytest.mark.usefixtures("in_float64")
def test_absent_gradients_of_tangents(tangents: int, present: tuple[bool, ...]) -> None:
    z, z_dot = torch.randn(5, 8), torch.randn(tangents, 5, 8)
    grads = [torch.randn(5, 8), torch.randn(tangents, 5, 8), torch.randn(tangents, 5)]
    arrived = [grad if here else None for grad, here in zip(grads, present, strict=True)]
    for coeffs in (torch.randn(4), torch.randn(4, 8)):
        for rectified, *needs in itertools.product((False, True), repeat=4):
            inputs = (z, z_dot, coeffs, *arrived, rectified, *needs)
            operator = polynomial_tangent.backward
            torch.testing.assert_close(operator(*inputs), operator.definition(*inputs))


@pytest.mark.usefixtures("in_float64")
def test_the_gradient_of_a_mean_is_used_where_it_lies() -> None:
    z, coeffs = torch.randn(40, 300), torch.randn(4)
    inputs = (z, None, coeffs, None, torch.tensor(0.5).expand(40), None, False, True, False, True)
    torch.testing.assert_close(polynomial_dreg.backward(*inputs), polynomial_dreg.backward.definition(*inputs))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("columns", [75, 37, 8])
@pytest.mark.usefixtures("in_float64")
def test_values_that_are_not_finite_stay_in_their_row(columns: int, value: float) -> None:
    z = torch.randn(6, columns)
    z[2, -1] = z[4, 0] = value
    coeffs = torch.randn(4)
    results = polynomial_dreg.forward(z, None, coeffs, False, True)
    torch.testing.assert_close(
        results, polynomial_dreg.forward.definition(z, None, coeffs, False, True), equal_nan=True
    )
    inputs = (z, None, coeffs, torch.randn(6, columns), torch.randn(6), None, False, True, False, True)
    actual, expected = polynomial_dreg.backward(*inputs), polynomial_dreg.backward.definition(*inputs)
    torch.testing.assert_close(actual[0], expected[0], equal_nan=True)
    torch.testing.assert_close(actual[2].isfinite(), expected[2].isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ck.ACTIVATION_KINDS)
def test_activations_far_out_and_near_zero(kind: str, dtype: torch.dtype) -> None:
    far = [0.0, 1e-20, 1e-8, 1e-4, 0.3, 0.6, 0.7, 5.0, 15.0, 30.0, 31.0, 90.0, 200.0, 2e3, 1e10, 1e30, float("inf")]
    z = torch.tensor([*far, *(-value for value in far), float("nan")], dtype=dtype).reshape(-1, 1)
    ones = torch.ones_like(z)
    expected = activation_dreg.forward.definition(z.double(), None, kind, True)
    found = activation_dreg.forward(z, None, kind, True)
    curvature = activation_dreg.backward(z, None, None, None, ones, kind, True, False)[0]
    exact = activation_dreg.backward.definition(z.double(), None, None, None, ones.double(), kind, True, False)[0]
    for one, other in zip((*found, curvature), (*expected, exact), strict=True):
        # Relative to the larger of 1 and the value: what is far below 1 beside values around 1 is not resolved further.
        # In float64 the definition, to which the kernel is compared, has rounding errors of its own.
        tolerance = (4 if dtype == torch.float32 else 64) * torch.finfo(dtype).eps
        torch.testing.assert_close(one, other.to(dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def test_coefficients_that_are_not_finite_do_not_reach_sums_from_outside_of_the_data() -> None:
    for columns in (75, 37, 8):
        coeffs = torch.tensor([1.0, float("inf"), 0.0, 0.0])
        z = torch.ones(3, columns)
        inputs = (z, None, coeffs, z, None, None, False, True, False, True)
        torch.testing.assert_close(
            polynomial_dreg.backward(*inputs), polynomial_dreg.backward.definition(*inputs), equal_nan=True
        )


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("per_channel", [False, True])
def test_nothing_passes_where_relu_is_flat(per_channel: bool, value: float) -> None:
    """An infinite gradient neither: the other tests of it compare the definition's forward with PyTorch's relu."""
    z = torch.tensor([-float("inf"), -1.0, -0.0, 0.0, 2.0, 3.0, float("inf"), float("nan")] * 3).reshape(2, 12)
    coeffs = torch.tensor([1.0, 2.0, 1.0])
    companion = torch.ones(12) if per_channel else None
    if per_channel:
        coeffs = coeffs[:, None].repeat(1, 12)
    arriving = torch.full_like(z, value)
    tangents, squares = torch.stack([torch.ones_like(z), arriving]), arriving[:, 0]
    flat = z <= 0
    for operators, function, flags in (
        (activation_dreg, (), ("relu", True, per_channel)),
        (polynomial_dreg, (coeffs,), (True, True, per_channel, True)),
    ):
        for grads in ((arriving, None, None), (None, None, arriving), (arriving, squares, arriving)):
            inputs = (z, companion, *function, *grads, *flags)
            found, expected = operators.backward(*inputs), operators.backward.definition(*inputs)
            torch.testing.assert_close(found, expected, equal_nan=True)
            assert not found[0][flat].any()
    for operators, function, flags in (
        (activation_tangent, (), ("relu",)),
        (polynomial_tangent, (coeffs,), (True,)),
    ):
        inputs = (z, tangents, *function, *flags)
        found, expected = operators.forward(*inputs), operators.forward.definition(*inputs)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert not found[1][:, flat].any()
        for grads in ((arriving, None, None), (None, tangents, None), (None, None, tangents[..., 0])):
            inputs = (z, tangents, *function, *grads, *flags, *[True] * (2 + len(function)))
            found, expected = operators.backward(*inputs), operators.backward.definition(*inputs)
            torch.testing.assert_close(found, expected, equal_nan=True)
            assert not found[0][flat].any()
            assert not found[1][:, flat].any()


# ---- through autograd ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
def test_gradcheck_and_gradgradcheck(per_channel: bool) -> None:
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    coeffs = torch.randn((4, 2) if per_channel else (4,), dtype=torch.float64, requires_grad=True)
    row_sq = torch.rand(2, dtype=torch.float64, requires_grad=True)
    z_dot = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def dreg(*inputs: Tensor) -> tuple[Tensor, ...]:
        return ck.polynomial_dreg(*inputs, return_derivative=True)

    assert torch.autograd.gradcheck(dreg, (z, coeffs, row_sq), fast_mode=True)
    assert torch.autograd.gradgradcheck(dreg, (z, coeffs, row_sq), fast_mode=True)
    assert torch.autograd.gradcheck(ck.polynomial_tangent, (z, z_dot, coeffs), fast_mode=True)
    assert torch.autograd.gradgradcheck(ck.polynomial_tangent, (z, z_dot, coeffs), fast_mode=True)


# Of this term 512 one after another are wrong by 7.6e-6 in float32; 64 terms, of any size, by no more than ALLOWED.
TERM, ALLOWED = 1.010025, 64 * 2.0**-24


@pytest.fixture
def one_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every program has as much work as the rules allow."""
    plans = [value for value in vars(_launch).values() if hasattr(value, "cache_clear")]
    monkeypatch.setattr(_launch, "PROGRAMS", 1)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


def relative_error(sums: Tensor, term: float, count: int) -> float:
    exact = torch.tensor(term).double() * count
    return ((sums.double() - exact).abs().max() / exact).item()


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("form", ["shared", "per channel", "tangents"])
def test_equal_terms_over_many_rows_do_not_drift(form: str) -> None:
    rows = 512 * {"shared": 512, "per channel": 16, "tangents": 16}[form]
    z = torch.ones(rows, 4)
    grad_y = torch.full_like(z, TERM)
    coeffs = torch.ones(2) if form == "shared" else torch.ones(2, 4)
    if form == "tangents":
        inputs = (z, torch.zeros(1, rows, 4), coeffs, grad_y, None, None, False, False, False, True)
        _, _, sums = polynomial_tangent.backward(*inputs)
    else:
        _, _, sums = polynomial_dreg.backward(z, None, coeffs, grad_y, None, None, False, False, False, True)
    assert relative_error(sums, TERM, rows * 4 // (sums.numel() // 2)) <= ALLOWED


@pytest.mark.usefixtures("one_program")
def test_the_norm_of_a_very_long_row_does_not_drift() -> None:
    columns = 512 * _launch.forward_tiles(4)[2].columns
    _, norm, _ = polynomial_dreg.forward(torch.ones(1, columns), None, torch.tensor([0.0, TERM**0.5]), False, False)
    assert relative_error(norm, TERM, columns) <= ALLOWED


def test_the_same_bits_again() -> None:
    z, coeffs, row_sq = torch.randn(40, 72), torch.randn(4, 72), torch.rand(72)
    inputs = (z, row_sq, coeffs, torch.randn(40, 72), torch.randn(40), None, False, True, True, True)
    first = [*polynomial_dreg.forward(z, row_sq, coeffs, False, True), *polynomial_dreg.backward(*inputs)]
    again = [*polynomial_dreg.forward(z, row_sq, coeffs, False, True), *polynomial_dreg.backward(*inputs)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)

"""Polynomial convolutions against the unfolded definition, for all combinations of options; the norm at borders."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared import FULLEST, Recorder, assert_same, differentiate, each, gradients_for, scalar
from torch import Tensor

import chainzrule_kernels as ck
from chainzrule_kernels.ops import _convolution_cpu
from chainzrule_kernels.testing.accuracy import error_of
from chainzrule_kernels.testing.cases import Case
from chainzrule_kernels.testing.layouts import channels_innermost

pytestmark = pytest.mark.usefixtures("target")

CONVOLUTIONS = {
    1: (ck.polynomial_conv1d, ck.polynomial_conv1d_dreg),
    2: (ck.polynomial_conv2d, ck.polynomial_conv2d_dreg),
}
SIZES = {1: (11,), 2: (7, 8)}
WINDOWS = {1: (3,), 2: (3, 2)}
STRIDES = {1: (1, 2, (3,)), 2: (1, (2, 3))}
PADDINGS = {1: (0, 2, ((0, 3),), "valid", "same"), 2: (0, 1, (2, 1), ((1, 2), (0, 3)), "valid", "same")}
DILATIONS = {1: (1, (2,)), 2: (1, (2, 3))}
OPTIONS = [
    (dimensions, stride, padding, dilation, groups, bias, per_channel)
    for dimensions in (1, 2)
    for stride, padding, dilation, groups, bias, per_channel in itertools.product(
        STRIDES[dimensions], PADDINGS[dimensions], DILATIONS[dimensions], (1, 2, 4), (True, False), (False, True)
    )
    if padding != "same" or stride == 1
]


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def _draw(dimensions: int, groups: int, bias: bool, per_channel: bool, device: str) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64).to(device)

    return {
        "x": normal(2, 4, *SIZES[dimensions]),
        "weight": normal(8, 4 // groups, *WINDOWS[dimensions]) / 3,
        **({"bias": normal(8)} if bias else {}),
        "coeffs": normal(*(4, 8) if per_channel else (4,)),
    }


def _unfolded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coeffs: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """Every patch of the image, times the weights, into the polynomial: the published way, with all of its options.

    One spatial dimension is an image of height 1.
    """
    dimensions = weight.dim() - 2
    strides, dilations = _each(stride, dimensions), _each(dilation, dimensions)
    reaches = [step * (taps - 1) for taps, step in zip(weight.shape[2:], dilations, strict=True)]
    if padding == "same":
        pairs = [(reach // 2, reach - reach // 2) for reach in reaches]
    elif padding == "valid":
        pairs = [(0, 0)] * dimensions
    else:
        pairs = [(pad, pad) if isinstance(pad, int) else pad for pad in _each(padding, dimensions)]
    x = F.pad(x, [size for pair in reversed(pairs) for size in pair])
    if dimensions == 1:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        strides, dilations, reaches = (1, *strides), (1, *dilations), [0, *reaches]
    patches = F.unfold(x, weight.shape[2:], dilation=dilations, stride=strides)
    patches = patches.unflatten(1, (groups, -1))
    filters = weight.flatten(1).unflatten(0, (groups, -1))
    s = torch.einsum("bgtp,gkt->bgkp", patches, filters).flatten(1, 2)
    if bias is not None:
        s = s + bias[:, None]
    columns = coeffs if coeffs.dim() == 1 else coeffs[:, :, None]
    y = sum(columns[power] * s**power for power in range(len(coeffs)))
    out = [(size - reach - 1) // step + 1 for size, reach, step in zip(x.shape[2:], reaches, strides, strict=True)]
    y = y.unflatten(2, out)
    return y.squeeze(2) if dimensions == 1 else y


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_outputs_and_gradients_equal_the_unfolded_definition(option: tuple[Any, ...], device: str) -> None:
    dimensions, stride, padding, dilation, groups, bias, per_channel = option
    where = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    tensors = _draw(dimensions, groups, bias, per_channel, device)
    arguments = where if bias else {**where, "bias": None}
    convolution, with_norm = CONVOLUTIONS[dimensions]
    gradients = gradients_for(_tuple(convolution(**tensors, **arguments)))
    expected = differentiate(lambda t: _tuple(_unfolded(**t, **arguments)), tensors, gradients)
    assert_same(differentiate(lambda t: _tuple(convolution(**t, **arguments)), tensors, gradients), expected)
    y, jac_sq = with_norm(**tensors, **arguments)
    torch.testing.assert_close(y, expected[0])
    for image, found in zip(tensors["x"], jac_sq, strict=True):
        alone = lambda i: _unfolded(**{**tensors, "x": i[None]}, **arguments)  # noqa: E731
        jacobian = torch.func.jacrev(alone)(image)
        torch.testing.assert_close(found, jacobian.square().sum())


def _tuple(y: Tensor) -> tuple[Tensor, ...]:
    return (y,)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_an_image_without_a_batch_dimension(dimensions: int, device: str) -> None:
    tensors = _draw(dimensions, 1, True, True, device)
    convolution, with_norm = CONVOLUTIONS[dimensions]
    batched, norms = with_norm(**tensors, padding=1)
    alone = {**tensors, "x": tensors["x"][0]}
    y, jac_sq = with_norm(**alone, padding=1)
    assert jac_sq.shape == ()
    assert_same([y, jac_sq, convolution(**alone, padding=1)], [batched[0], norms[0], batched[0]])


def test_padding_is_not_a_zero_of_the_result(device: str) -> None:
    # s = b outside the image, and y = p(b) there.
    x, weight = torch.randn(1, 2, 3, 3, device=device), torch.randn(4, 2, 1, 1, device=device)
    bias, coeffs = torch.randn(4, device=device), torch.tensor([0.5, 1.0, 2.0, 0.3], device=device)
    y, jac_sq = ck.polynomial_conv2d_dreg(x, weight, bias, coeffs, padding=1)
    torch.testing.assert_close(y[0, :, 0, 0], ck.polynomial(bias, coeffs))
    _, inside = ck.polynomial_conv2d_dreg(x, weight, bias, coeffs)
    torch.testing.assert_close(jac_sq, inside)


# ---- blocks, layouts, dtypes ----------------------------------------------------------------------------------------


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in tensors.items()}


@pytest.mark.parametrize("blocks", [1, 4, 7])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("arrange", [lambda values: values, channels_innermost], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_of_several_blocks(
    dtype: torch.dtype,
    arrange: Callable[[Tensor], Tensor],
    per_channel: bool,
    blocks: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = torch.Generator().manual_seed(1)
    shapes = {"x": (7, 16, 40, 41), "weight": (48, 16, 3, 3), "bias": (48,), "coeffs": (4, 48) if per_channel else (4,)}
    tensors = {name: torch.randn(shape, generator=numbers) / 4 for name, shape in shapes.items()}
    samples = {1: 7, 4: 2, 7: 1}[blocks]
    monkeypatch.setattr(_convolution_cpu, "ELEMENTS_AT_ONCE", samples * 48 * 40 * 41)
    monkeypatch.setattr(_convolution_cpu, "ELEMENTS_PER_BLOCK", samples * 48 * 40 * 41)
    tensors = {name: value.to(device, dtype) for name, value in tensors.items()}
    tensors["x"] = arrange(tensors["x"])
    function = lambda t: ck.polynomial_conv2d_dreg(**t, padding=1)  # noqa: E731
    with torch.no_grad():
        y, jac_sq = function(tensors)  # nothing is kept, and y may take the place of s
    assert_same([y, jac_sq], [result.detach() for result in function(_leaves(tensors))], rtol=0.0, atol=0.0)
    gradients = [gradient.abs() for gradient in gradients_for(function(tensors))]
    found = differentiate(function, tensors, gradients)
    doubles = {name: value.double() for name, value in tensors.items()}
    reference = lambda t: ck.reference.polynomial_conv2d_dreg(**t, padding=1)  # noqa: E731
    exact = differentiate(reference, doubles, [gradient.double() for gradient in gradients])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip(found, exact, strict=True):
        assert error_of(one, other) <= tolerance * other.abs().max().item()
    # The results of the forward pass come from float32 sums whatever the dtype.
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_results_have_their_channels_where_x_or_the_weight_has_them(dimensions: int, device: str) -> None:
    tensors = _draw(dimensions, 1, True, True, device)
    for arranged in ((), ("x",), ("weight",), ("x", "weight")):
        given = {name: channels_innermost(value) if name in arranged else value for name, value in tensors.items()}
        given["x"] = given["x"].detach().requires_grad_()
        y = CONVOLUTIONS[dimensions][0](**given)
        assert y.movedim(1, -1).is_contiguous() == bool(arranged)
        assert y.is_contiguous() != bool(arranged)
        torch.testing.assert_close(y, CONVOLUTIONS[dimensions][0](**tensors))


def test_half_precision_takes_the_polynomial_of_the_float32_sum(device: str) -> None:
    # 257 rounds to 256 in bfloat16: with the rounded sum the difference would vanish.
    x = torch.tensor([256.0, 1.0], dtype=torch.bfloat16, device=device).reshape(1, 2, 1, 1)
    weight = torch.ones(1, 2, 1, 1, device=device)
    coeffs = torch.tensor([-256.0, 1.0], device=device)
    y = ck.polynomial_conv2d(x, weight, None, coeffs)
    assert y.item() == 1.0


def test_the_backward_sees_the_stored_sum(device: str, compiled: bool) -> None:
    x = torch.tensor([256.0, 1.0], dtype=torch.bfloat16, device=device).reshape(1, 2, 1, 1)
    weight = torch.ones(1, 2, 1, 1, dtype=torch.bfloat16, device=device)
    coeffs = torch.tensor([0.0, 1.0], device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(ck.polynomial_conv2d(x, weight, None, coeffs).sum(), coeffs)
    assert gradient.tolist() == [1.0, 256.0]


def _convolutions(recorder: Recorder) -> list[Any]:
    """The calls of the convolution's operator, beside which that of the squared taps may have been called."""
    return [call for call in recorder.own_calls if call[0]._schema.name.endswith("::polynomial_convolution")]


# ---- memory ---------------------------------------------------------------------------------------------------------


@each([case for case in FULLEST if case.op.startswith("polynomial_conv")])
def test_s_is_kept_for_training_and_not_written_in_inference(case: Case, device: str) -> None:
    tensors = case.arguments((6, 4, 5, 7)[: 3 if "1d" in case.op else 4], device=device)
    for differentiable in (False, True):
        given = {name: value.detach().requires_grad_(differentiable) for name, value in tensors.items()}
        with Recorder() as recorder:
            results = case(given)
        ((_, _, (_, _, s)),) = _convolutions(recorder)
        assert s.numel() == (results[0].numel() if differentiable else 0)
    with torch.no_grad(), Recorder() as recorder:
        case({name: value.requires_grad_() for name, value in tensors.items()})
    ((_, _, (_, _, s)),) = _convolutions(recorder)
    assert s.numel() == 0


@each([case for case in FULLEST if case.op.startswith("polynomial_conv")])
def test_derivatives_of_an_operator_that_kept_nothing(case: Case, device: str) -> None:
    # As torch.compile would differentiate a graph traced under no_grad: s is computed again.
    tensors = case.arguments((2, 3, 4, 5)[: 3 if "1d" in case.op else 4], torch.float64, device=device)
    with Recorder() as recorder:
        case(tensors)
    ((operator, arguments, _),) = _convolutions(recorder)
    assert arguments[-1] is False
    count = sum(isinstance(value, Tensor) for value in arguments[:5])
    leaves = [value.detach().requires_grad_() if isinstance(value, Tensor) else value for value in arguments[:5]]
    found = []
    for keep in (False, True):
        loss = scalar(operator(*leaves, *arguments[5:-1], keep)[:2])
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found.append(torch.autograd.grad(loss, wanted))
    assert len(found[0]) == count
    assert_same(*found)


def test_on_the_meta_device_there_are_shapes_and_nothing_else() -> None:
    x, weight, coeffs = (torch.empty(shape, device="meta") for shape in ((2, 3, 5, 6), (4, 3, 3, 3), (4,)))
    with ck.backend("auto"):
        y, jac_sq = ck.polynomial_conv2d_dreg(x, weight, None, coeffs, padding=1)
    assert (y.shape, jac_sq.shape, y.device.type) == ((2, 4, 5, 6), (2,), "meta")


# ---- the short way of small calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_norm", [False, True])
def test_a_call_that_somebody_watches_gives_the_same(with_norm: bool, device: str) -> None:
    # Past PyTorch's dispatcher unless a mode wants to see the operators.
    tensors = _draw(2, 1, True, False, device)
    convolution = CONVOLUTIONS[2][with_norm]
    function = lambda t: results if isinstance(results := convolution(**t, padding=1), tuple) else (results,)  # noqa: E731
    for _ in range(2):
        with torch.no_grad(), Recorder() as recorder:
            watched = function(tensors)
        assert len(_convolutions(recorder)) == 1
        with torch.no_grad():
            assert_same(function(tensors), watched, rtol=0.0, atol=0.0)
    gradients = gradients_for(watched)
    found = differentiate(function, tensors, gradients)
    with Recorder():
        assert_same(found, differentiate(function, tensors, gradients), rtol=0.0, atol=0.0)


def test_a_tensor_subclass_sees_the_operator(device: str) -> None:
    class Seen(Tensor):
        names: list[str] = []  # noqa: RUF012 - of the class, as the calls are

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.names.append(func._schema.name)
            with torch._C._DisableTorchDispatch():
                plain = [value.as_subclass(Tensor) if isinstance(value, cls) else value for value in args]
                return func(*plain, **(kwargs or {}))

    tensors = _draw(2, 1, False, False, device)
    expected = ck.polynomial_conv2d(**tensors, bias=None)
    found = ck.polynomial_conv2d(**{**tensors, "x": tensors["x"].as_subclass(Seen)}, bias=None)
    assert "chainzrule_kernels::polynomial_convolution" in Seen.names
    assert_same([found.as_subclass(Tensor)], [expected])


def test_one_number_in_a_sequence_stands_for_all(device: str) -> None:
    # As in torch.nn.functional.conv2d.
    tensors = _draw(2, 1, True, False, device)
    for given in ((2,), [2]):
        options = {"stride": given, "padding": given, "dilation": given}
        found = ck.polynomial_conv2d_dreg(**tensors, **options)
        assert_same(found, ck.polynomial_conv2d_dreg(**tensors, stride=2, padding=2, dilation=2))
        s = F.conv2d(tensors["x"], tensors["weight"], tensors["bias"], given, given, given)
        assert found[0].shape == s.shape


def test_what_was_checked_before_does_not_excuse_a_look_alike(device: str) -> None:
    tensors = _draw(2, 1, True, False, device)
    for name, right, wrong in (("groups", 1, True), ("stride", (1, 1), (1, True)), ("padding", (1, 1), (1, 1.0))):
        ck.polynomial_conv2d(**tensors, **{name: right})
        with pytest.raises(TypeError, match=rf"^{name}: expected a whole number"):
            ck.polynomial_conv2d(**tensors, **{name: wrong})

"""The activation of maps that a convolution made, which is given the weight of the convolution: the operators, DREG."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared import (
    DTYPES,
    TORCH_ACTIVATIONS,
    ConvolvedCase,
    Recorder,
    assert_bitwise,
    assert_same,
    convolved_case,
    differentiate,
    each_dtype,
    gradients_for,
    scalar,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import chainzrule_kernels as ck
from chainzrule_kernels import _distributed, _native
from chainzrule_kernels.dreg import interception
from chainzrule_kernels.functions import ACTIVATION_KINDS
from chainzrule_kernels.ops._convolution import geometry
from chainzrule_kernels.ops.activation_spatial_dreg.op import operators as maps
from chainzrule_kernels.ops.convolved_activation_dreg import op
from chainzrule_kernels.ops.convolved_activation_dreg.definition import weighted
from chainzrule_kernels.ops.squared_weights.op import numbers
from chainzrule_kernels.ops.squared_weights.op import operators as squares
from chainzrule_kernels.testing.accuracy import measure
from chainzrule_kernels.testing.layouts import Arrangement, Layout, channels_innermost, contiguous, permuted, sliced

# Batch and filters, channels for each filter, the image, the window, stride, padding, dilation.
GEOMETRIES: dict[str, tuple[tuple[int, int], int, tuple[int, ...], tuple[int, ...], Any, Any, Any]] = {
    "padding on all sides": ((3, 4), 3, (5, 6), (3, 3), 1, 1, 1),
    "stride": ((2, 5), 3, (12, 10), (7, 7), (2, 3), 3, 1),
    "dilation": ((2, 3), 2, (7, 9), (3, 2), 1, "same", (2, 1)),
    "uneven padding": ((2, 3), 2, (4, 4), (3, 5), 1, ((0, 2), (3, 1)), 1),
    "a window larger than the image": ((2, 3), 2, (2, 3), (5, 3), 1, (6, 1), (3, 1)),
    "no padding": ((3, 4), 2, (5, 6), (3, 2), 1, 0, 1),
    "one dimension": ((2, 3), 2, (11,), (4,), 1, 2, 3),
    "three dimensions": ((2, 3), 2, (4, 5, 6), (2, 3, 4), (1, 2, 1), 1, 1),
    "each channel alone": ((2, 6), 1, (5, 6), (3, 3), 1, 1, 1),
    # Rows of a vector of float32 (16, of the widest instruction set), of one and a half, of two and a half with a rest.
    "rows of a vector": ((3, 3), 2, (10, 16), (3, 3), 1, 1, 1),
    "rows of more than a vector": ((2, 3), 2, (12, 24), (3, 3), 1, 1, 1),
    "rows of vectors and a rest": ((9, 5), 2, (11, 43), (3, 5), 1, (1, 2), 1),
    "rows that are all alike": ((2, 3), 2, (3, 20), (1, 3), 1, (0, 1), 1),
    "rows of planes": ((2, 2), 2, (5, 6, 17), (2, 1, 3), 1, ((1, 0), 0, 1), 1),
    "rows with a stride": ((2, 3), 2, (40, 38), (3, 3), 2, 1, 1),
    # Maps that are cut into several tiles: by rows, and by positions of rows wider than a chunk.
    "many rows": ((2, 2), 2, (300, 300), (3, 3), 1, 1, 1),
    "wide rows": ((1, 2), 1, (3, 70000), (3, 3), 1, 1, 1),
    "many channels": ((5, 150), 2, (14, 33), (3, 3), 1, 1, 1),
}
NAMES = list(GEOMETRIES)
SMALL = NAMES[:-3]


def _case(name: str, kind: str = "gelu", factor: bool = True) -> tuple[ConvolvedCase, tuple[int, ...]]:
    """The case, and the shape of its maps."""
    maps, channels, size, window, *where = GEOMETRIES[name]
    stride, padding, dilation = where
    of_windows = geometry(window, stride, padding, dilation)
    case = convolved_case(
        kind,
        factor=factor,
        channels=channels,
        window=window,
        size=size,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    return case, (*maps, *of_windows.out_size(size, window))


def _windows(name: str) -> tuple[Any, ...]:
    """The numbers that the operators take."""
    _, _, size, window, *where = GEOMETRIES[name]
    return numbers(size, geometry(window, *where))


def _arguments(tensors: dict[str, Tensor], name: str, kind: str) -> tuple[Any, ...]:
    return (tensors["z"], tensors["weight"], tensors.get("factor"), *_windows(name), kind)


def _two_operators(name: str, kind: str) -> Callable[..., tuple[Tensor, ...]]:
    """The squares of the weight, and then the activation of maps with these squares."""

    def function(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        sums = squares.forward(tensors["weight"], *_windows(name))
        return maps.forward(tensors["z"], weighted(sums, tensors.get("factor")), kind)

    return function


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_geometry(name: str) -> None:
    for kind, factor in (("gelu", True), ("relu", False)):
        case, shape = _case(name, kind, factor)
        for arrange in (contiguous, channels_innermost):
            tensors = case.arguments(shape, torch.float64, arrange=arrange)
            gradients = gradients_for(case(tensors))
            found = differentiate(case, tensors, gradients)
            for other in (case.plain_expression, case.reference, _two_operators(name, kind)):
                assert_same(found, differentiate(other, tensors, gradients))
            assert found[0].stride() == tensors["z"].stride()
            assert found[2].stride() == tensors["z"].stride()


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_every_activation_is_that_of_pytorch(kind: str) -> None:
    # Its slope by automatic differentiation, in rows of a kind and for each column.
    for name in ("rows of vectors and a rest", "padding on all sides", "no padding"):
        case, shape = _case(name, kind)

        def expected(tensors: dict[str, Tensor], name: str = name) -> tuple[Tensor, ...]:
            y = TORCH_ACTIVATIONS[kind](tensors["z"])
            (slope,) = torch.autograd.grad(y.sum(), tensors["z"], create_graph=True)
            sums = squares.forward.definition(tensors["weight"], *_windows(name))
            if sums.dim() == 1:
                sums = sums[:, None, None]
            return y, (slope.square() * sums * tensors["factor"][:, None, None]).sum((1, 2, 3))

        tensors = case.arguments(shape, torch.float64)
        gradients = gradients_for(case(tensors))
        assert_same(differentiate(case, tensors, gradients), differentiate(expected, tensors, gradients))


def test_the_norm_is_that_of_the_jacobian() -> None:
    torch.manual_seed(0)
    for size, window, where in (((9, 8), (3, 3), (1, 1, 1)), ((5, 4), (3, 2), (2, 1, 1)), ((4, 5), (2, 3), (1, 0, 1))):
        x, weight = torch.randn(2, 4, *size).double(), torch.randn(2, 2, *window).double()

        def layer(image: Tensor, weight: Tensor = weight, where: tuple[int, ...] = where) -> Tensor:
            return F.silu(F.conv2d(image, weight, None, *where, groups=2))

        s = F.conv2d(x, weight, None, *where, groups=2)
        _, jac_sq = op.operators.forward(s, weight, None, *numbers(size, geometry(window, *where)), "silu")
        jacobians = [torch.func.jacrev(layer)(image) for image in x]
        torch.testing.assert_close(jac_sq, torch.stack([jacobian.square().sum() for jacobian in jacobians]))


@each_dtype(DTYPES)
@pytest.mark.parametrize("name", ["padding on all sides", "no padding", "rows of vectors and a rest"])
def test_errors_are_small(name: str, dtype: torch.dtype) -> None:
    for kind, factor in (("mish", True), ("relu", False)):
        case, shape = _case(name, kind, factor)
        for arrange in (contiguous, channels_innermost):
            parameters = torch.float64 if dtype == torch.float64 else torch.float32
            judged = measure(case, Layout(name, shape, arrange), dtype, parameters, ["auto"])
            assert [quantity for quantity in judged["auto"] if not quantity.passed] == []


def test_errors_of_large_maps_are_small() -> None:
    for name in ("many rows", "wide rows", "many channels"):
        case, shape = _case(name)
        judged = measure(case, Layout(name, shape, contiguous), torch.float32, torch.float32, ["auto"])
        assert [quantity for quantity in judged["auto"] if not quantity.passed] == []


def test_weights_and_factors_of_half_precision() -> None:
    case, shape = _case("rows of vectors and a rest")
    for dtype in (torch.bfloat16, torch.float16):
        tensors = case.arguments(shape, dtype)
        found = differentiate(case, tensors, gradients_for(case(tensors)))
        assert [value.dtype for value in found] == [dtype, torch.float32, dtype, dtype, dtype]
        judged = measure(case, Layout("half", shape, contiguous), dtype, dtype, ["auto"])
        assert [quantity for quantity in judged["auto"] if not quantity.passed] == []


def test_any_layout() -> None:
    for name in ("padding on all sides", "rows of a vector", "no padding"):
        case, shape = _case(name)
        tensors = case.arguments(shape)
        expected = differentiate(case, tensors)
        gradients = gradients_for(expected[:2])
        views = (
            sliced(tensors["z"]),
            permuted(tensors["z"]),
            tensors["z"].repeat(2, 1, 1, 1)[: shape[0]],
            torch.cat([tensors["z"]] * 2, 1)[:, : shape[1]],
        )
        for z in views:
            assert_same(differentiate(case, {**tensors, "z": z}, gradients), expected)
        for arrange in (sliced, channels_innermost):
            assert_same(differentiate(case, {**tensors, "weight": arrange(tensors["weight"])}, gradients), expected)
        # The first image for all of them, and the gradients of stride 0 that .sum().backward() sends.
        expanded = tensors["z"][:1].expand(shape)
        copied = {**tensors, "z": expanded.contiguous()}
        assert_same(differentiate(case, {**tensors, "z": expanded}, gradients), differentiate(case, copied, gradients))
        y, jac_sq = expected[:2]
        of_sums = [torch.ones(()).expand_as(y), torch.ones(()).expand_as(jac_sq)]
        ones = [torch.ones_like(y), torch.ones_like(jac_sq)]
        assert_same(differentiate(case, tensors, of_sums), differentiate(case, tensors, ones))


@pytest.mark.parametrize("name", ["padding on all sides", "rows of a vector", "no padding"])
def test_gradients_for_some_of_the_arguments_and_of_some_of_the_results(name: str) -> None:
    for kind in ("mish", "relu"):
        case, shape = _case(name, kind)
        tensors = case.arguments(shape, torch.float64)
        arriving = gradients_for(case(tensors))
        for results in ((0,), (1,), (0, 1)):
            for wanted in (("z",), ("weight",), ("factor",), ("z", "factor"), ("z", "weight"), ("weight", "factor")):
                found = []
                for function in (case, case.plain_expression):
                    leaves = {key: value.clone().requires_grad_(key in wanted) for key, value in tensors.items()}
                    given = function(leaves)
                    loss = sum((given[index] * arriving[index]).sum() for index in results)
                    # The plain slope of relu depends on nothing, as far as autograd knows; y not on the weight.
                    loss = loss + sum(0 * leaves[key].sum() for key in wanted)
                    found.append(torch.autograd.grad(loss, [leaves[key] for key in wanted]))
                assert_same(*found)


def test_nothing_to_sum() -> None:
    windows = numbers((10, 16), geometry((3, 3), 1, 1, 1))
    # What the first leaves in memory must not be the gradients of the others.
    for batch, filters, channels in ((9, 3, 2), (0, 3, 2), (2, 0, 2), (2, 3, 0), (0, 0, 0)):
        for where in (windows, ((), (), (), ())):
            z = torch.randn(batch, filters, 10, 16, requires_grad=True)
            weight = torch.randn(filters, channels, 3, 3, requires_grad=True)
            factor = torch.rand(filters, requires_grad=True)
            y, jac_sq = op.operators.forward(z, weight, factor, *where, "gelu")
            torch.testing.assert_close(y, F.gelu(z))
            assert jac_sq.shape == (batch,)
            assert channels > 0 or torch.equal(jac_sq, torch.zeros(batch))
            found = torch.autograd.grad(y.sum() + jac_sq.sum(), (z, weight, factor))
            assert [gradient.shape for gradient in found] == [z.shape, weight.shape, factor.shape]
            if batch == 0 or channels == 0:
                assert torch.equal(found[1], torch.zeros_like(weight))
                assert torch.equal(found[2], torch.zeros_like(factor))


@pytest.mark.usefixtures("threads")
def test_they_have_the_same_bits_for_any_number_of_threads() -> None:
    for name in ("many channels", "rows of vectors and a rest", "stride", "no padding"):
        case, shape = _case(name)
        for arrange in (contiguous, channels_innermost):
            tensors = case.arguments((17, *shape[1:]), arrange=arrange)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(differentiate(case, tensors))
            for other in results[1:]:
                assert_bitwise(other, results[0])


def test_nan_and_infinities_go_through_and_relu_is_flat() -> None:
    for name in ("padding on all sides", "rows of a vector", "no padding"):
        for kind in ("relu", "gelu", "silu"):
            case, shape = _case(name, kind)
            tensors = case.arguments(shape)
            special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 200.0, -200.0])
            for index, value in enumerate(special):
                z = tensors["z"].clone()
                z[0, 0].view(-1)[index] = value
                given = {**tensors, "z": z}
                gradients = gradients_for(case(given))
                expected = differentiate(_two_operators(name, kind), given, gradients)
                assert_same(differentiate(case, given, gradients), expected)
        case, shape = _case(name, "relu")
        tensors = case.arguments(shape)
        z = tensors["z"].requires_grad_()
        for number in (math.inf, -math.inf, math.nan):
            y, jac_sq = case({**tensors, "z": z})
            arriving = [torch.full_like(y, number), torch.full_like(jac_sq, number)]
            (gradient,) = torch.autograd.grad([y, jac_sq], z, arriving)
            assert torch.equal(gradient[z <= 0], torch.zeros_like(gradient[z <= 0]))
            torch.testing.assert_close(gradient[z > 0], torch.full_like(gradient[z > 0], number), equal_nan=True)


# ---- derivatives of every order --------------------------------------------------------------------------------------

# Rows of eight: a vector of float64 of the widest instruction set.
DERIVATIVES = {
    "columns": ((2, 2), 2, (3, 2), (3, 2), 1, 1, 1),
    "channels": ((2, 2), 1, (3, 3), (2, 3), 1, 0, 1),
    "rows": ((1, 2), 1, (3, 8), (1, 3), 1, (0, 1), 1),
}


def _function(
    name: str, kind: str, factor: bool, arrange: Arrangement
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    case, shape = _case(name, kind, factor)
    tensors = case.arguments(shape, torch.float64, arrange=arrange, requires_grad=True)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return case(dict(zip(tensors, values, strict=True)))

    return function, tuple(tensors.values())


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_derivative(name: str, factor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEOMETRIES, name, DERIVATIVES[name])
    for kind, arrange in (("mish", contiguous), ("tanh", channels_innermost)):
        function, values = _function(name, kind, factor, arrange)
        gradcheck(
            function,
            values,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
            fast_mode=True,
        )
        gradgradcheck(
            function,
            values,
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            check_undefined_grad=True,
            fast_mode=True,
        )


@pytest.mark.parametrize("name", DERIVATIVES)
def test_transforms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEOMETRIES, name, DERIVATIVES[name])
    case, shape = _case(name, "silu")
    tensors = case.arguments(shape, torch.float64)

    def loss(function: Callable[..., Any], z: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        return scalar(function({"z": z, "weight": weight, "factor": factor}))

    values = tuple(tensors.values())
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        found, expected = (
            transform(lambda *given, function=function: loss(function, *given), argnums=(0, 1, 2))(*values)
            for function in (case, case.plain_expression)
        )
        torch.testing.assert_close(found, expected)
    many = [torch.stack([value, 2 * value, value.square()]) for value in values]
    for dims in ((0, 0, 0), (0, None, None), (None, 0, None)):
        given = [of_many if dim == 0 else value for of_many, value, dim in zip(many, values, dims, strict=True)]
        found = torch.vmap(lambda *given: loss(case, *given), in_dims=dims)(*given)
        each = [
            [values_of[index] if dim == 0 else values_of for values_of, dim in zip(given, dims, strict=True)]
            for index in range(3)
        ]
        torch.testing.assert_close(found, torch.stack([loss(case, *one) for one in each]))


# ---- errors and instruction sets -------------------------------------------------------------------------------------


def test_the_kernels_refuse_what_does_not_fit(compiled: bool) -> None:
    if not compiled:
        pytest.skip("the definition runs: the compiled CPU module is not there")
    z, weight, factor = torch.ones(2, 4, 5, 6), torch.ones(4, 3, 3, 3), torch.ones(4)
    size, *where = numbers((5, 6), geometry((3, 3), 1, 1, 1))
    wrong: list[tuple[Sequence[Any], str]] = [
        ((z[:, :3], weight, factor, size, *where), "not the result of a convolution"),
        ((z[..., :5], weight, factor, size, *where), "not the result of a convolution"),
        ((z[0], weight, factor, size, *where), "not the result of a convolution"),
        ((z, weight[:3], factor, size, *where), "not the result of a convolution"),
        ((z, weight.double(), factor, size, *where), "the weight has the wrong dtype"),
        ((z.double(), weight, factor, size, *where), "the weight has the wrong dtype"),
        ((z, weight, factor[:3], size, *where), "factor has the wrong shape"),
        ((z, weight, factor.long(), size, *where), "expected a float32"),
        ((z.long(), weight, factor, size, *where), "expected a float32"),
        ((z, weight[..., 0], factor, size, *where), "does not fit the sizes"),
        ((z, weight, factor, (1, 1), where[0], (0,) * 4, where[2]), "does not fit the image"),
        ((z, weight, factor, size, (1, 0), *where[1:]), "stride must be positive"),
    ]
    operators = torch.ops.chainzrule_kernels
    for arguments, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            operators.convolved_activation_dreg(*arguments, "gelu")
        first, last = arguments[:3], arguments[3:]
        with pytest.raises(RuntimeError, match=message):
            operators.convolved_activation_dreg_backward(
                *first, None, torch.ones(len(first[0])), *last, "gelu", True, True, True
            )
    with pytest.raises(RuntimeError, match="there is no activation called cosine"):
        operators.convolved_activation_dreg(z, weight, factor, size, *where, "cosine")
    for grad_y, grad_jac_sq in ((z[:1], torch.ones(2)), (z, torch.ones(3)), (z.double(), torch.ones(2))):
        with pytest.raises(RuntimeError, match="has the wrong"):
            operators.convolved_activation_dreg_backward(
                z, weight, factor, grad_y, grad_jac_sq, size, *where, "gelu", True, True, True
            )
    with pytest.raises(RuntimeError, match="no factor to take a gradient of"):
        operators.convolved_activation_dreg_backward(
            z, weight, None, z, torch.ones(2), size, *where, "gelu", True, True, True
        )


def check_every_way() -> None:
    """Each way of the kernels, for the instruction set of this process."""
    for name in SMALL:
        case, shape = _case(name)
        for arrange in (contiguous, channels_innermost):
            tensors = case.arguments(shape, torch.float64, arrange=arrange)
            gradients = gradients_for(case(tensors))
            expected = differentiate(case.plain_expression, tensors, gradients)
            assert_same(differentiate(case, tensors, gradients), expected)
    for name in ("padding on all sides", "rows of vectors and a rest", "no padding"):
        case, shape = _case(name, "relu")
        for dtype in (torch.float32, torch.bfloat16):
            judged = measure(case, Layout(name, shape, contiguous), dtype, torch.float32, ["auto"])
            assert [quantity for quantity in judged["auto"] if not quantity.passed] == []
    print(_native.cpu.instruction_set())


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instruction_set: str) -> None:
    if _native.cpu is None:
        pytest.skip(f"no native CPU module: {_native.missing_because}")
    if instruction_set == _native.cpu.instruction_set():
        pytest.skip("the other tests run on it")
    environment = {**os.environ, "CHAINZRULE_KERNELS_INSTRUCTION_SET": instruction_set, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    finished = subprocess.run(
        [sys.executable, "-c", "import test_convolved_activation as tests; tests.check_every_way()"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "expected one of" in finished.stderr:
        pytest.skip(f"this CPU has no {instruction_set}")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == instruction_set


# ---- DREG ------------------------------------------------------------------------------------------------------------

STRENGTH = 0.7


class Calling(nn.Module):
    """A convolution and functions behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


class Checkpointed(nn.Module):
    """A convolution and its activation, which run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def _chunked(z: Tensor) -> Tensor:
    first, second = z.chunk(2, 1)
    return torch.tanh(first) + second


def _with_batch_norm(activation: nn.Module) -> nn.Module:
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), norm, activation)


def _frozen() -> nn.Module:
    model = _with_batch_norm(nn.Mish())
    model[0].weight.requires_grad_(False)
    return model


def _spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)), nn.GELU())


# What builds it, and whether one operator does it.
MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "relu": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)), True),
    "groups and no padding": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Sigmoid()), True),
    "functions": (lambda: Calling(F.relu), True),
    "batch norm": (lambda: _with_batch_norm(nn.GELU()), True),
    "batch norm in evaluation": (lambda: _with_batch_norm(nn.GELU()).eval(), True),
    "frozen": (_frozen, True),
    "spectral norm": (_spectral, True),
    "checkpointed": (Checkpointed, True),
    "two layers": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Softplus()),
        True,
    ),
    "chunks": (lambda: Calling(_chunked), False),
    "polynomial": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), ck.nn.Polynomial(noise=0.3)), False),
}


def _built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = MODELS[name][0]().double()
    return model, torch.randn(3, 3, 12, 19, dtype=torch.float64)


def _step(model: nn.Module, reg: ck.DREG, x: Tensor) -> list[Tensor]:
    """The output, the penalty, their gradients, and those of the squares of the penalty's gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    y = model(x)
    penalty = reg.penalty()
    of_loss = torch.autograd.grad(y.square().mean() + penalty, parameters, retain_graph=True)
    if isinstance(model, Checkpointed):
        return [y, penalty, *of_loss]
    of_penalty = torch.autograd.grad(penalty, parameters, create_graph=True, materialize_grads=True)
    squares_of = sum(gradient.square().sum() for gradient in of_penalty)
    again = torch.autograd.grad(squares_of, parameters, materialize_grads=True)
    return [y, penalty, *of_loss, *of_penalty, *again]


def _compose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares of the weight by an operator of their own."""

    def squares_alone(weight: Tensor, x: Tensor, *where: Any, weight_stays: bool) -> Tensor:
        assert weight_stays
        return op.squared_taps(weight, x, geometry(weight.shape[2:], *where))

    monkeypatch.setattr(interception, "convolution_in_front", squares_alone)


def _called(recorder: Recorder) -> bool:
    return any(call[0]._schema.name.endswith("::convolved_activation_dreg") for call in recorder.own_calls)


@pytest.mark.parametrize("name", MODELS)
def test_dreg_is_that_of_the_composed_way(name: str, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    model, x = _built(name)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    with Recorder() as recorder:
        found = _step(model, ck.DREG(model, STRENGTH), x)
    assert _called(recorder) == (MODELS[name][1] and compiled)
    with ck.backend("reference"):
        reference = _step(third, ck.DREG(third, STRENGTH), x)
    assert_same(found, reference)
    _compose(monkeypatch)
    with Recorder() as recorder:
        expected = _step(twin, ck.DREG(twin, STRENGTH), x)
    assert not _called(recorder)
    assert_same(found, expected)
    assert_same(list(model.buffers()), list(twin.buffers()))


def _both_ways(name: str, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> tuple[Any, Any]:
    """What ``run(model, regulariser, x)`` gives, and what it gives the composed way."""
    model, x = _built(name)
    twin = copy.deepcopy(model)
    found = run(model, ck.DREG(model, STRENGTH), x)
    _compose(monkeypatch)
    return found, run(twin, ck.DREG(twin, STRENGTH), x)


@pytest.mark.parametrize("name", ["relu", "batch norm", "two layers"])
def test_dreg_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: nn.Module, reg: ck.DREG, x: Tensor) -> list[Tensor]:
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x.float())
        penalty = reg.penalty()
        assert penalty.dtype == torch.float32
        gradients = torch.autograd.grad(y.float().square().mean() + penalty, list(model.parameters()))
        # They have come through tensors of bfloat16.
        return [y, penalty, *(gradient.bfloat16() for gradient in gradients)]

    assert_same(*_both_ways(name, monkeypatch, run))


def test_dreg_of_functional_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: nn.Module, reg: ck.DREG, x: Tensor) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().sum() + reg.penalty()

        given = {key: value.detach() for key, value in model.named_parameters()}
        return list(torch.func.grad(loss)(given).values())

    for name in ("relu", "batch norm in evaluation"):
        with monkeypatch.context() as patched:
            assert_same(*_both_ways(name, patched, run))


def test_dreg_where_the_maps_go_over_to_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: nn.Module, reg: ck.DREG, x: Tensor) -> list[Tensor]:
        model.float()
        y = model(x.float())
        penalty = reg.penalty()
        assert penalty.dtype == torch.float64
        return [y, penalty, *torch.autograd.grad(y.square().mean() + penalty, list(model.parameters()))]

    monkeypatch.setitem(MODELS, "double", (lambda: Calling(lambda z: F.silu(z.double())), False))
    assert_same(*_both_ways("double", monkeypatch, run))


def test_dreg_of_convolutions_with_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        convolution = nn.Conv2d(3, 4, 3)
        # As code that changes a model's strides leaves them; the constructor makes tuples.
        convolution.stride, convolution.padding, convolution.dilation = [2, 1], [1, 2], [1, 1]
        return nn.Sequential(convolution, nn.Tanh())

    monkeypatch.setitem(MODELS, "lists", (build, True))
    assert_same(*_both_ways("lists", monkeypatch, _step))


@pytest.mark.parametrize("name", ["relu", "batch norm", "functions"])
def test_dreg_of_compiled_models_takes_what_the_compiler_can_fuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    results = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")):
        model, x = _built(name)
        reg = ck.DREG(model, STRENGTH)
        y = wrap(model)(x)
        penalty = reg.penalty()
        gradients = torch.autograd.grad(y.square().mean() + penalty, list(model.parameters()))
        results.append([y, penalty, *gradients])
        # From here on a call of the operator would raise.
        for way in ("overload", "apply_eagerly"):
            monkeypatch.setattr(op.operators.forward, way, None)
    assert_same(*results)


class LeftOut(Calling):
    """A convolution and its activation, which the compiler leaves out of its graphs."""

    @torch._dynamo.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_dreg_keeps_no_weight_that_another_process_may_take_away(monkeypatch: pytest.MonkeyPatch) -> None:
    # FSDP2 frees a layer's weight behind its forward.
    monkeypatch.setattr(_distributed, "may_shard", lambda: True)
    for way in ("overload", "apply_eagerly"):
        monkeypatch.setattr(op.operators.forward, way, None)  # a call would raise
    x = torch.randn(2, 3, 5, 6)
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        torch._dynamo.reset()
        model = nn.Sequential(LeftOut(F.silu), nn.Flatten())
        reg = ck.DREG(model, STRENGTH)
        wrap(model)(x)
        reg.penalty().backward()
        assert model[0].conv.weight.grad is not None


def test_dreg_reports_and_monitors(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: nn.Module, reg: ck.DREG, x: Tensor) -> list[tuple[float, ...]]:
        model.eval()
        model(x)
        rows = [*reg.report(x), *ck.JacobianMonitor(reg, every=1).measure(x)]
        return [(row.mean, row.p99, row.tail_ratio, row.nonlinearity) for row in rows]

    for name in ("two layers", "batch norm", "polynomial"):
        with monkeypatch.context() as patched:
            found, expected = _both_ways(name, patched, run)
        assert found == [pytest.approx(row) for row in expected]

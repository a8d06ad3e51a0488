"""The CUDA convolution run on the host: the kernels of csrc/cuda and their binding, against the definition in float64.

tests/cuda/host_device.h says what of a GPU is emulated. Speed, races and PTX are for a real one (tests/test_gpu.py).
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_builds
import pytest
import torch
import torch.nn.functional as F
from shared import Recorder, assert_bitwise
from torch import Tensor

from chainzrule_kernels import _native_cuda
from chainzrule_kernels.ops import _convolution_rule as rule
from chainzrule_kernels.ops._convolution_operator import operator
from chainzrule_kernels.testing import accuracy
from chainzrule_kernels.testing.cases import generator

pytestmark = [
    pytest.mark.skipif(
        cuda_builds.missing() is not None, reason=f"the CUDA convolution cannot be compiled: {cuda_builds.missing()}"
    ),
    pytest.mark.skipif(_native_cuda.cuda is not None, reason="the module itself is loaded: test_gpu.py runs it"),
]

ARITHMETICS = ("bfloat16", "float16", "tfloat32", "float32")
each_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS)

# As many as the rule draws to know the error of the plain expression.
DRAWS = 6

Operator = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled kernels, built once, however many processes test."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    return cuda_builds.once(shared / "host", cuda_builds.compile_for_host) / "convolution.so"


@pytest.fixture(scope="session")
def convolve(library: Path) -> Operator:
    """The operator of the CUDA module, on CPU tensors."""
    torch.ops.load_library(str(library))
    return torch.ops.chainzrule_kernels_cuda.polynomial_convolution.default


def dtype_of(arithmetic: str) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(arithmetic, torch.float32)


def draw(shape: tuple[int, ...], arithmetic: str, purpose: str, seed: int, scale: float = 1.0) -> Tensor:
    """Numbers of the dtype; for TF32 such as it holds exactly, so that its results are those of float32."""
    values = (scale * torch.randn(shape, generator=generator(purpose, seed))).to(dtype_of(arithmetic))
    return (values.view(torch.int32) & ~0x1FFF).view(torch.float32) if arithmetic == "tfloat32" else values


def expression(
    x: Tensor, weight: Tensor, bias: Tensor | None, coeffs: Tensor, tap_sq: Tensor | None, *geometry: Any
) -> list[Tensor]:
    """``y, jac_sq, s`` in plain PyTorch, in the dtype of ``x``."""
    parameters = [None if value is None else value.to(x.dtype) for value in (bias, coeffs, tap_sq)]
    bias, coeffs, tap_sq = parameters
    s = (F.conv1d if x.dim() == 3 else F.conv2d)(x, weight, bias, *geometry)
    assert coeffs is not None
    each = coeffs.reshape(coeffs.shape[0], *coeffs.shape[1:], *(1,) * (x.dim() - 2))
    *lower, last, slope = each.unbind()
    value = slope * s + last
    slope = slope.expand_as(s)
    for coefficient in reversed(lower):
        slope = slope * s + value
        value = value * s + coefficient
    squares = slope.square()
    if tap_sq is not None:
        squares = squares * (tap_sq if tap_sq.dim() > 1 else tap_sq.reshape(-1, *(1,) * (x.dim() - 2)))
    return [value, squares.flatten(1).sum(1), s]


def errors_of(plain: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest error of each result, where both are finite."""
    finite = [one.isfinite() & other.to(one.dtype).isfinite() for one, other in zip(plain, exact, strict=True)]
    both = zip(plain, exact, finite, strict=True)
    return [(one.double() - other)[where].abs().max().item() for one, other, where in both]


def judge(convolve: Operator, arithmetic: str, *shapes_and_geometry: Any, **options: Any) -> None:
    """Run the operator on a problem and hold each result to the rule of chainzrule_kernels.testing.accuracy."""
    geometry = shapes_and_geometry[-1]
    largest = [0.0, 0.0, 0.0]
    for seed in reversed(range(DRAWS)):
        arguments = problem(arithmetic, *shapes_and_geometry, **options, seed=seed)
        exact = expression(*(None if value is None else value.double() for value in arguments), *geometry)
        largest = [max(pair) for pair in zip(largest, errors_of(expression(*arguments, *geometry), exact), strict=True)]
    results = convolve(*arguments, *geometry, True, True, arithmetic == "tfloat32")
    dtype = dtype_of(arithmetic)
    for name, result, correct, plain_error in zip(("y", "jac_sq", "s"), results, exact, largest, strict=True):
        assert result.shape == correct.shape
        assert result.dtype == (torch.float32 if name == "jac_sq" else dtype)
        verdict = accuracy.compare(name, result, correct, plain_error, dtype)
        assert verdict.passed, f"{verdict}"


def problem(
    arithmetic: str,
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: list[Any],
    *,
    degree: int = 3,
    shared: bool = False,
    bias: bool = True,
    taps: bool = True,
    taps_per_position: bool = True,
    in_groups: bool = False,
    seed: int = 0,
) -> list[Any]:
    """``x`` (channels innermost), ``weight``, ``bias``, ``coeffs``, ``tap_sq``."""
    filters, fan_in = weight_shape[0], torch.Size(weight_shape[1:]).numel()
    x = draw(x_shape, arithmetic, "x", seed, 0.5).movedim(1, -1).contiguous().movedim(-1, 1)
    weight = draw(weight_shape, arithmetic, "weight", seed, fan_in**-0.5)
    stride, padding, dilation = geometry
    convolution = F.conv1d if x.dim() == 3 else F.conv2d
    out = convolution(x.float(), weight.float(), None, stride, padding, dilation, 1 + in_groups).shape[2:]
    # So small that the sum, in half precision too, is finite.
    tap_sq = torch.rand(filters, *(out if taps_per_position else ()), generator=generator("taps", seed))
    tap_sq /= filters * out.numel()
    falling = 0.5 ** torch.arange(1.0, degree + 2)
    coeffs = torch.randn(*([] if shared else [filters]), degree + 1, generator=generator("coeffs", seed)) * falling
    return [
        x,
        weight,
        draw((filters,), arithmetic, "bias", seed, 0.25) if bias else None,
        coeffs.movedim(-1, 0).contiguous(),
        tap_sq if taps else None,
    ]


GEOMETRIES = {
    "3x3": ((2, 16, 9, 7), (72, 16, 3, 3), [[1, 1], [1, 1], [1, 1]]),
    "strided and dilated": ((3, 8, 11, 10), (136, 8, 3, 2), [[2, 1], [0, 3], [1, 2]]),
    "1x1, rows of several samples in a block": ((5, 24, 5, 6), (200, 24, 1, 1), [[1, 1], [0, 0], [1, 1]]),
    "more padding than window": ((2, 8, 6, 5), (16, 8, 2, 2), [[3, 2], [4, 2], [2, 2]]),
    "one output": ((1, 8, 3, 3), (8, 8, 3, 3), [[1, 1], [0, 0], [1, 1]]),
    "one dimension": ((2, 16, 150), (64, 16, 5), [[2], [2], [1]]),
}


@each_arithmetic
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometries(convolve: Operator, arithmetic: str, geometry: str) -> None:
    x_shape, weight_shape, numbers = GEOMETRIES[geometry]
    judge(convolve, arithmetic, x_shape, weight_shape, numbers)


@each_arithmetic
@pytest.mark.parametrize("degree", range(1, 9))
def test_degrees(convolve: Operator, arithmetic: str, degree: int) -> None:
    numbers = [[1, 1], [1, 1], [1, 1]]
    judge(convolve, arithmetic, (1, 8, 5, 4), (16, 8, 3, 3), numbers, degree=degree, shared=degree % 2 == 0)


@each_arithmetic
def test_absent_arguments(convolve: Operator, arithmetic: str) -> None:
    numbers = [[1, 1], [0, 0], [1, 1]]
    judge(convolve, arithmetic, (2, 8, 4, 4), (8, 8, 2, 2), numbers, bias=False, taps=False)


@each_arithmetic
def test_tap_sums_that_are_the_same_at_every_position(convolve: Operator, arithmetic: str) -> None:
    numbers = [[2, 1], [0, 0], [1, 1]]
    judge(convolve, arithmetic, (2, 8, 6, 5), (72, 8, 2, 2), numbers, taps_per_position=False)


def test_channels_that_are_no_multiple_of_anything(convolve: Operator) -> None:
    numbers = [[1, 1], [1, 1], [1, 1]]
    judge(convolve, "float32", (2, 3, 7, 7), (37, 3, 3, 3), numbers)


@each_arithmetic
def test_results_that_are_not_wanted_are_empty_and_change_nothing(convolve: Operator, arithmetic: str) -> None:
    numbers = [[1, 1], [1, 1], [1, 1]]
    arguments = problem(arithmetic, (2, 8, 5, 5), (16, 8, 3, 3), numbers)
    tf32 = arithmetic == "tfloat32"
    y, jac_sq, s = convolve(*arguments, *numbers, True, True, tf32)
    only_y = convolve(*arguments, *numbers, False, False, tf32)
    assert [result.shape for result in only_y[1:]] == [(0,), (0,)]
    assert_bitwise(only_y[:1], [y])
    assert_bitwise(convolve(*arguments, *numbers, True, False, tf32)[:2], [y, jac_sq])
    assert_bitwise(convolve(*arguments, *numbers, False, True, tf32)[::2], [y, s])


@pytest.mark.parametrize("x_innermost", [True, False])
@pytest.mark.parametrize("weight_innermost", [True, False])
def test_layouts(convolve: Operator, x_innermost: bool, weight_innermost: bool) -> None:
    numbers = [[1, 1], [1, 1], [1, 1]]
    x, weight, *rest = problem("float32", (2, 8, 5, 4), (16, 8, 3, 3), numbers)
    expected = convolve(x, weight, *rest, *numbers, True, True, False)
    x = x if x_innermost else x.contiguous()
    weight = weight.to(memory_format=torch.channels_last) if weight_innermost else weight
    found = convolve(x, weight, *rest, *numbers, True, True, False)
    assert_bitwise([value.contiguous() for value in found], [value.contiguous() for value in expected])
    innermost = x_innermost or weight_innermost
    for value in (found[0], found[2]):
        assert value.is_contiguous(memory_format=torch.channels_last if innermost else torch.contiguous_format)


def test_any_strides_and_any_alignment(convolve: Operator) -> None:
    numbers = [[1, 1], [1, 1], [1, 1]]
    x, weight, bias, coeffs, tap_sq = problem("bfloat16", (2, 8, 5, 4), (16, 8, 3, 3), numbers)
    expected = convolve(x, weight, bias, coeffs, tap_sq, *numbers, True, True, False)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(2, 5, 4, 8).movedim(-1, 1).copy_(x)
    assert shifted.data_ptr() % 16 != 0
    every_other = torch.empty(2 * 16, 8, 3, 3, dtype=x.dtype)[::2].copy_(weight)
    transposed = tap_sq.movedim(0, -1).contiguous().movedim(-1, 0)
    found = convolve(shifted, every_other, bias.float(), coeffs.double(), transposed, *numbers, True, True, False)
    assert_bitwise(found, expected)


def test_r16_empty_batch(convolve: Operator) -> None:
    numbers = [[1, 1], [1, 1], [1, 1]]
    arguments = problem("float32", (1, 8, 5, 4), (16, 8, 3, 3), numbers)
    y, jac_sq, s = convolve(arguments[0][:0], *arguments[1:], *numbers, True, True, False)
    assert (y.shape, jac_sq.shape, s.shape) == ((0, 16, 5, 4), (0,), (0, 16, 5, 4))


def test_r08_more_than_one_launch_counts(convolve: Operator) -> None:
    """The host build puts 32 KiB in a launch, as the GPU build puts 2 GiB."""
    numbers = [[1, 1], [1, 1], [1, 1]]
    arguments = problem("float32", (7, 8, 16, 16), (16, 8, 3, 3), numbers)
    together = convolve(*arguments, *numbers, True, True, False)
    x, *rest = arguments
    assert x[:2].nbytes < 1 << 15 < x.nbytes
    one_by_one = [convolve(sample, *rest, *numbers, True, True, False) for sample in x.split(1)]
    assert_bitwise(together, [torch.cat(parts) for parts in zip(*one_by_one, strict=True)])


@each_arithmetic
def test_what_is_not_finite_goes_through(convolve: Operator, arithmetic: str) -> None:
    numbers = [[1, 1], [0, 0], [1, 1]]
    arguments = problem(arithmetic, (3, 8, 4, 4), (8, 8, 2, 2), numbers, taps=False)
    x = arguments[0]
    x[1, 3, 2, 2], x[2, 0, 0, 0] = float("inf"), float("nan")
    results = convolve(*arguments, *numbers, True, True, arithmetic == "tfloat32")
    plain = expression(*(value.float() if value is not None else None for value in arguments), *numbers)
    for result, expected in zip(results, plain, strict=True):
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isinf(), expected.isinf())


def test_y_comes_from_the_sum_before_it_is_rounded(convolve: Operator) -> None:
    numbers = [[1, 1], [0, 0], [1, 1]]
    x, weight, *_ = problem("bfloat16", (2, 64, 6, 6), (32, 64, 1, 1), numbers)
    identity = torch.tensor([-4.0, 1.0])
    y, _, s = convolve(x, weight, torch.full((32,), 4.0), identity, None, *numbers, True, True, False)
    exact = F.conv2d(x.double(), weight.double())
    # s is near 4 and loses what y, near 0, keeps.
    assert (y.double() - exact).abs().max() < (s.double() - 4 - exact).abs().max() / 2


@each_arithmetic
@pytest.mark.usefixtures("convolve")
def test_the_kernel_of_the_operator_calls_the_compiled_one(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "tf32_allowed", lambda: arithmetic == "tfloat32")
    numbers = [[2, 1], [1, 1], [1, 1]]
    arguments = problem(arithmetic, (2, 16, 6, 5), (24, 16, 3, 3), numbers)
    with Recorder() as recorder:
        found = _native_cuda.polynomial_convolution(*arguments, *numbers, 1, True, True)
    assert [call[0].namespace for call in recorder.calls][:1] == ["chainzrule_kernels_cuda"]
    expected = operator.definition_as_kernel(*arguments, *numbers, 1, True, True)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=1.6e-2, atol=1e-2)


@pytest.mark.usefixtures("convolve")
def test_what_the_compiled_kernel_does_not_take_is_left_to_the_definition() -> None:
    numbers = [[1, 1], [1, 1], [1, 1]]
    x, weight, bias, coeffs, tap_sq = problem("float32", (2, 16, 6, 5), (24, 8, 3, 3), numbers, in_groups=True)
    arguments = (x, weight, bias, coeffs, tap_sq, *numbers, 2, True, True)
    with Recorder() as recorder:
        found = _native_cuda.polynomial_convolution(*arguments)
    assert "chainzrule_kernels_cuda" not in {call[0].namespace for call in recorder.calls}
    assert_bitwise(found, operator.definition_as_kernel(*arguments))


# ---- the limits, CUTLASS's and ours ----------------------------------------------------------------------------------


class Convolution(ctypes.Structure):
    """``chainzrule::Convolution`` of csrc/cuda/convolution.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in ("batch", "height", "width", "channels", "out_height", "out_width", "filters")
        ),
        *((name, ctypes.c_int) for name in ("kernel_height", "kernel_width", "padding_height", "padding_width")),
        *((name, ctypes.c_int) for name in ("stride_height", "stride_width", "dilation_height", "dilation_width")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "coefficients")),
        ("degree", ctypes.c_int),
        ("per_channel", ctypes.c_bool),
        ("tap_sq", ctypes.c_void_p),
        ("tap_sq_per_position", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("y", "s", "row_sums")),
        ("row_sums_stride", ctypes.c_int64),
    ]


def taken_by_cutlass(functions: ctypes.CDLL, call: rule.Problem) -> bool:
    """What the compiled kernel's own check says of one sample of a call."""
    assert call.padding is not None
    numbers = [1, *call.size, call.channels, *call.out_size, call.filters, *call.window]
    numbers += [*call.padding, *call.stride, *call.dilation]
    convolution = Convolution(*numbers, None, None, None, None, 3)
    return bool(functions.can_convolve(ARITHMETICS.index(call.arithmetic), ctypes.byref(convolution)) & 1)


SIZES = {
    "usual": {},
    "channels 12": {"channels": 12},
    "channels 4": {"channels": 4},
    "channels 3": {"channels": 3},
    "filters 100": {"filters": 100},
    "filters 20": {"filters": 20},
    "filters 30": {"filters": 30},
    "stride and dilation": {"stride": (2, 3), "dilation": (2, 1)},
    "window 7, stride 2": {"window": (7, 7), "padding": (3, 3), "stride": (2, 2)},
    "window 32": {"window": (32, 32), "size": (40, 40)},
    "window 33": {"window": (33, 1), "size": (40, 40)},
    "window 1 x 33": {"window": (1, 33), "size": (40, 40)},
    "padding 130": {"padding": (130, 130), "stride": (8, 8)},
    "x of 2 GiB": {"channels": 1 << 12, "size": (1 << 10, 1 << 9), "stride": (64, 64)},
    "x of less than 2 GiB": {"channels": 1 << 12, "size": (1 << 8, 1 << 9), "stride": (64, 64), "filters": 8},
    "y of 2 GiB": {"filters": 1 << 12, "size": (1 << 10, 1 << 9), "channels": 8},
    "weight of 2 GiB": {"filters": 1 << 15, "channels": 1 << 14, "window": (2, 1)},
}


@each_arithmetic
@pytest.mark.parametrize("size", SIZES)
def test_the_limits_are_those_of_cutlass(library: Path, arithmetic: str, size: str) -> None:
    functions = ctypes.CDLL(str(library))
    usual = {"batch": 1, "channels": 64, "filters": 128, "groups": 1, "size": (28, 28), "window": (3, 3)}
    usual |= {"padding": (1, 1), "stride": (1, 1), "dilation": (1, 1), "channels_innermost": True}
    call = rule.Problem(arithmetic, **{**usual, **SIZES[size]})
    assert (rule.cannot(call) is None) == taken_by_cutlass(functions, call), rule.cannot(call)


def test_tiles_are_those_of_the_kernel(library: Path) -> None:
    functions = ctypes.CDLL(str(library))
    for filters in range(1, 700):
        assert rule.tile_columns(filters) == functions.columns_of_tile(filters)


@pytest.mark.parametrize(("stride", "padding", "dilation"), list(itertools.product((1, 2, 3), (0, 1, 3), (1, 2))))
def test_output_sizes_are_those_of_pytorch(stride: int, padding: int, dilation: int) -> None:
    x, weight = torch.empty(1, 2, 13, 9), torch.empty(4, 2, 3, 2)
    found = rule.problem(x, weight, stride, padding, dilation).out_size
    assert found == F.conv2d(x, weight, None, stride, padding, dilation).shape[2:]

"""Bad input: a TypeError or ValueError that names the argument, what came and what was expected, before any kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shared import FULLEST, Recorder
from torch import Tensor

import chainzrule_kernels as ck
from chainzrule_kernels.ops import PUBLIC_OPS

BATCH, CHANNELS = 3, 5
FLOATS = "float32, float64, bfloat16 or float16"


@dataclass(frozen=True)
class Mistake:
    """A wrong argument: how it is made from the right one, and what the error must be and say."""

    argument: str
    words: str
    make: Callable[[Any], Any]
    error: type[Exception]
    says: tuple[str, ...]


def _every_tensor(argument: str) -> list[Mistake]:
    return [
        Mistake(argument, "a list", lambda value: value.tolist(), TypeError, ("torch.Tensor", "list")),
        Mistake(argument, "an array", lambda value: value.numpy(), TypeError, ("torch.Tensor", "ndarray")),
        Mistake(argument, "int64", lambda value: value.long(), TypeError, (FLOATS, "int64")),
        Mistake(argument, "int8", lambda value: value.to(torch.int8), TypeError, (FLOATS, "int8")),
        Mistake(argument, "bool", lambda value: value > 0, TypeError, (FLOATS, "bool")),
        Mistake(argument, "complex64", lambda value: value.to(torch.complex64), TypeError, (FLOATS, "complex64")),
        Mistake(argument, "float8", lambda value: value.to(torch.float8_e4m3fn), TypeError, (FLOATS, "float8_e4m3fn")),
        Mistake(argument, "sparse", lambda value: value.to_sparse(), TypeError, ("dense", "sparse_coo")),
    ]


def _data(argument: str) -> list[Mistake]:
    return [
        *_every_tensor(argument),
        Mistake(argument, "0-d", lambda value: value.sum(), ValueError, ("(..., N)", "0-d")),
    ]


def _maps(argument: str) -> list[Mistake]:
    return [
        *_every_tensor(argument),
        Mistake(argument, "0-d", lambda value: value.sum(), ValueError, ("(B, C, *spatial)", "()")),
        Mistake(argument, "1-d", lambda value: value[0], ValueError, ("(B, C, *spatial)", f"({CHANNELS},)")),
    ]


def _on_meta(argument: str) -> Mistake:
    return Mistake(argument, "on another device", lambda value: value.to("meta"), ValueError, ("device cpu", "meta"))


def _coeffs(channels: int) -> list[Mistake]:
    return [
        *_every_tensor("coeffs"),
        Mistake("coeffs", "None", lambda value: None, TypeError, ("torch.Tensor", "NoneType")),
        Mistake("coeffs", "0-d", lambda value: value.sum(), ValueError, ("(D+1,)", "()")),
        Mistake(
            "coeffs", "3-d", lambda value: value.reshape(4, 1, -1), ValueError, ("(D+1, N)", f"(4, 1, {channels})")
        ),
        Mistake("coeffs", "degree 0", lambda value: value[:1, 0], ValueError, ("degree", "1 and 8", "(1,)")),
        Mistake("coeffs", "degree 9", lambda value: torch.ones(10), ValueError, ("degree", "1 and 8", "(10,)")),
        Mistake(
            "coeffs", "degree 9 per channel", lambda value: torch.ones(10, channels), ValueError, ("1 and 8", "(10, ")
        ),
        Mistake("coeffs", "no coefficient", lambda value: value[:0, 0], ValueError, ("degree", "(0,)")),
        Mistake(
            "coeffs",
            "another number of channels",
            lambda value: value[:, 1:],
            ValueError,
            (f"(4, {channels})", f"(4, {channels - 1})"),
        ),
        Mistake("coeffs", "one channel", lambda value: value[:, :1], ValueError, (f"(4, {channels})", "(4, 1)")),
        _on_meta("coeffs"),
    ]


ROW_SQ = [
    *_every_tensor("row_sq"),
    Mistake("row_sq", "0-d", lambda value: value.sum(), ValueError, (f"({CHANNELS},)", "()")),
    Mistake("row_sq", "2-d", lambda value: value[None], ValueError, (f"({CHANNELS},)", f"(1, {CHANNELS})")),
    Mistake("row_sq", "too long", lambda value: torch.ones(6), ValueError, (f"({CHANNELS},)", "(6,)")),
    Mistake("row_sq", "one element", lambda value: value[:1], ValueError, (f"({CHANNELS},)", "(1,)")),
    _on_meta("row_sq"),
]
TAP_SQ = [
    *_every_tensor("tap_sq"),
    Mistake("tap_sq", "0-d", lambda value: value.sum(), ValueError, (f"({CHANNELS},)", "()")),
    Mistake("tap_sq", "for a batch", lambda value: value[None], ValueError, (f"({CHANNELS},)", f"(1, {CHANNELS})")),
    Mistake("tap_sq", "one element", lambda value: value[:1], ValueError, (f"({CHANNELS},)", "(1,)")),
    _on_meta("tap_sq"),
]
Z_DOT = [
    *_every_tensor("z_dot"),
    Mistake("z_dot", "without T", lambda value: value[0], ValueError, (f"(T, {BATCH}, {CHANNELS})", "(3, 5)")),
    Mistake("z_dot", "another batch", lambda value: value[:, 1:], ValueError, (f"(T, {BATCH}, {CHANNELS})", "2, 5)")),
    Mistake("z_dot", "another width", lambda value: value[..., 1:], ValueError, (f"(T, {BATCH}, {CHANNELS})", "3, 4)")),
    Mistake("z_dot", "another dtype", lambda value: value.double(), TypeError, ("float32", "float64")),
    _on_meta("z_dot"),
]
KIND = [
    Mistake("kind", "unknown", lambda value: "elu", ValueError, ("gelu_tanh", "'elu'")),
    Mistake("kind", "of another case", lambda value: "ReLU", ValueError, ("relu", "'ReLU'")),
    Mistake("kind", "a function", lambda value: torch.relu, TypeError, ("string", "relu")),
    Mistake("kind", "None", lambda value: None, TypeError, ("string", "NoneType")),
]
OUT = CHANNELS + 4
LINEAR = [
    *_data("x"),
    *_every_tensor("weight"),
    Mistake("weight", "1-d", lambda value: value[0], ValueError, (f"(out_features, {CHANNELS})", f"({CHANNELS},)")),
    Mistake("weight", "3-d", lambda value: value[None], ValueError, (f"(out_features, {CHANNELS})", "(1, ")),
    Mistake("weight", "transposed", lambda value: value.T, ValueError, (f"(out_features, {CHANNELS})", f"(5, {OUT})")),
    _on_meta("weight"),
    *_every_tensor("bias"),
    Mistake("bias", "2-d", lambda value: value[None], ValueError, (f"({OUT},)", f"(1, {OUT})")),
    Mistake("bias", "too short", lambda value: value[1:], ValueError, (f"({OUT},)", f"({OUT - 1},)")),
    _on_meta("bias"),
]
GEOMETRY = [
    *(
        Mistake(name, words, make, error, says)
        for name, least in (("stride", 1), ("dilation", 1))
        for words, make, error, says in (
            ("0", lambda value: 0, ValueError, (f"at least {least}", "got 0")),
            ("a float", lambda value: 1.5, TypeError, ("whole number", "float")),
            ("too many", lambda value: (1, 1, 1), ValueError, ("number", "(1, 1, 1)")),
        )
    ),
    Mistake("padding", "negative", lambda value: -1, ValueError, ("at least 0", "-1")),
    Mistake("padding", "a negative pair", lambda value: ((0, -1),), ValueError, ("at least 0", "-1")),
    Mistake("padding", "a word", lambda value: "full", ValueError, ("'same'", "'full'")),
    Mistake("padding", "a float", lambda value: 0.5, TypeError, ("whole number", "float")),
    Mistake("padding", "pairs of three", lambda value: ((0, 1, 2),), ValueError, ("2 numbers", "(0, 1, 2)")),
    Mistake("padding", "too many pairs", lambda value: ((0, 1),) * 3, ValueError, ("pairs", "3")),
    Mistake("groups", "0", lambda value: 0, ValueError, ("at least 1", "got 0")),
    Mistake("groups", "no divisor", lambda value: 2, ValueError, (f"divisor of the {CHANNELS} channels", "2")),
    Mistake("groups", "True", lambda value: True, TypeError, ("whole number", "bool")),
]


def _convolution(sizes: int) -> list[Mistake]:
    image = f"({BATCH}, {CHANNELS}, {'3' if sizes == 1 else '4, 3'})"
    return [
        *_every_tensor("x"),
        Mistake("x", "0-d", lambda value: value.sum(), ValueError, ("(B, C, ", "got ()")),
        Mistake("x", "a row", lambda value: value.flatten(), ValueError, ("(B, C, ", ",)")),
        Mistake("x", "too small", lambda value: value[..., :0], ValueError, ("at least", "padding included", "0)")),
        *_every_tensor("weight"),
        Mistake("weight", "1-d", lambda value: value.flatten(), ValueError, (f"(K, {CHANNELS}, *window)", image)),
        Mistake("weight", "of another x", lambda value: value[:, 1:], ValueError, (f"(K, {CHANNELS}, *window)", image)),
        Mistake("weight", "without filters", lambda value: value[:0], ValueError, ("none of them 0", "(0, ")),
        Mistake("weight", "without taps", lambda value: value[..., :0], ValueError, ("none of them 0", "0)")),
        Mistake(
            "weight", "transposed", lambda value: value.transpose(0, 1), ValueError, ("(K, ", f"({CHANNELS}, {OUT}")
        ),
        _on_meta("weight"),
        *_every_tensor("bias"),
        Mistake("bias", "2-d", lambda value: value[None], ValueError, (f"({OUT},)", f"(1, {OUT})")),
        Mistake("bias", "too short", lambda value: value[1:], ValueError, (f"({OUT},)", f"({OUT - 1},)")),
        _on_meta("bias"),
        *_coeffs(OUT),
        *GEOMETRY,
    ]


def test_same_padding_needs_stride_one() -> None:
    x, weight, coeffs = torch.ones(1, 2, 6, 6), torch.ones(3, 2, 3, 3), torch.ones(4)
    with pytest.raises(ValueError, match=r"^padding: expected numbers for a stride other than 1, got 'same'"):
        ck.polynomial_conv2d(x, weight, None, coeffs, stride=2, padding="same")


def test_a_convolution_wants_an_image_that_is_not_empty() -> None:
    # With enough padding the windows would fit into it; PyTorch's convolution raises a RuntimeError.
    x, weight, coeffs = torch.ones(2, 3, 0, 5), torch.ones(4, 3, 3, 3), torch.ones(4)
    with pytest.raises(
        ValueError, match=r"^x: expected at least one element in each spatial dimension, got \(2, 3, 0, 5\)"
    ):
        ck.polynomial_conv2d(x, weight, None, coeffs, padding=2)


def test_padding_is_a_number_or_a_pair_for_each_dimension() -> None:
    x, weight, coeffs = torch.ones(2, 3, 4, 5), torch.ones(4, 3, 3, 3), torch.ones(4)
    with pytest.raises(ValueError, match=r"^padding: expected pairs of 2 numbers, got \(\(1,\), \(2,\)\)"):
        ck.polynomial_conv2d(x, weight, None, coeffs, padding=((1,), (2,)))


def test_groups_must_divide_the_filters() -> None:
    x, weight, coeffs = torch.ones(1, 4, 6, 6), torch.ones(3, 2, 3, 3), torch.ones(4)
    with pytest.raises(ValueError, match=r"^groups: expected a divisor of the 3 filters of weight, got 2"):
        ck.polynomial_conv2d(x, weight, None, coeffs, groups=2)


MISTAKES: dict[str, list[Mistake]] = {
    "polynomial": [*_data("z"), *_coeffs(CHANNELS)],
    "polynomial_dreg": [*_data("z"), *_coeffs(CHANNELS), *ROW_SQ],
    "activation_dreg": [*_data("z"), *KIND, *ROW_SQ],
    "polynomial_spatial_dreg": [*_maps("z"), *_coeffs(CHANNELS), *TAP_SQ],
    "activation_spatial_dreg": [*_maps("z"), *KIND, *TAP_SQ],
    "polynomial_tangent": [*_data("z"), *Z_DOT, *_coeffs(CHANNELS)],
    "activation_tangent": [*_data("z"), *Z_DOT, *KIND],
    **{f"polynomial_conv{sizes}d{words}": _convolution(sizes) for sizes in (1, 2) for words in ("", "_dreg")},
    "linear_polynomial_dreg": [*LINEAR, *_coeffs(OUT)],
    "linear_activation_dreg": [*LINEAR, *KIND],
}


def test_every_op_is_listed() -> None:
    assert set(MISTAKES) == set(PUBLIC_OPS)
    for op, mistakes in MISTAKES.items():
        (case,) = (case for case in FULLEST if case.op == op)
        tensors = {argument.name for argument in case.tensors}
        assert tensors <= {mistake.argument for mistake in mistakes}


def _right_arguments(op: str) -> dict[str, Any]:
    (case,) = (case for case in FULLEST if case.op == op)
    return {**case.arguments((BATCH, CHANNELS)), **case.constants}


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize(
    ("op", "mistake"),
    [
        pytest.param(op, mistake, id=f"{op}-{mistake.argument} {mistake.words}")
        for op, mistakes in MISTAKES.items()
        for mistake in mistakes
    ],
)
def test_a_mistake_is_named(op: str, mistake: Mistake, name: str) -> None:
    arguments = _right_arguments(op)
    arguments[mistake.argument] = mistake.make(arguments[mistake.argument])
    with ck.backend(name), Recorder() as recorder, pytest.raises((TypeError, ValueError)) as caught:
        PUBLIC_OPS[op].function(**arguments)
    assert caught.type is mistake.error
    message = str(caught.value)
    assert message.startswith(f"{mistake.argument}: expected ")
    for words in mistake.says:
        assert words in message
    assert recorder.calls == []


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_explain_makes_the_same_checks(op: str) -> None:
    for mistake in MISTAKES[op]:
        arguments = _right_arguments(op)
        arguments[mistake.argument] = mistake.make(arguments[mistake.argument])
        with pytest.raises(mistake.error, match=f"^{mistake.argument}: expected "):
            ck.explain(op, **arguments)


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_right_arguments_raise_nothing(op: str) -> None:
    results = PUBLIC_OPS[op].function(**_right_arguments(op))
    assert all(isinstance(result, Tensor) for result in (results if isinstance(results, tuple) else (results,)))

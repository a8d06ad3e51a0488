"""The registered operators, and what stands for the squares of a weight until they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainzrule_kernels import backends
from chainzrule_kernels._registration import Operator, as_it_is
from chainzrule_kernels.functions import SAME_DERIVATIVES_AT_VALUE, compute_dtype
from chainzrule_kernels.functions.sums import sum_over_trailing
from chainzrule_kernels.ops._convolution import Numbers as WholeNumbers
from chainzrule_kernels.ops._convolution import Padding, geometry
from chainzrule_kernels.ops._feature_maps import like_the_input
from chainzrule_kernels.ops._operator_pairs import OperatorPair, spatial_dreg_fake
from chainzrule_kernels.ops._terms import cast, plus
from chainzrule_kernels.ops.activation_spatial_dreg.op import activation_spatial_dreg
from chainzrule_kernels.ops.activation_spatial_dreg.op import operators as maps
from chainzrule_kernels.ops.convolved_activation_dreg import definition
from chainzrule_kernels.ops.convolved_activation_dreg.definition import weighted
from chainzrule_kernels.ops.squared_weights.op import Numbers, in_dtype_of_op, in_plain_pytorch, numbers, squared_taps
from chainzrule_kernels.ops.squared_weights.op import operators as squares


class ConvolutionInFront(NamedTuple):
    """The weight of the convolution that made some maps, in the place of its squares.

    Attributes:
        weight: in a dtype of which the squares have the one that an op on the maps computes in.
        windows: see :func:`chainzrule_kernels.ops.squared_weights.op.numbers`.
        factor: what the squares of each channel are multiplied with, ``(K,)``; None for 1.
    """

    weight: Tensor
    windows: Numbers
    factor: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the squares."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def times(self, factor: Tensor) -> ConvolutionInFront:
        """With every channel's squares multiplied by one more number ``(K,)``."""
        return self._replace(factor=factor if self.factor is None else self.factor * factor)

    def tap_sq(self) -> Tensor:
        """The squares ``(K, *out)`` or ``(K,)`` themselves."""
        return weighted(squares.forward(self.weight, *self.windows), self.factor)

    def activation_dreg(self, z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """:func:`chainzrule_kernels.activation_spatial_dreg` with these squares, which are never written down.

        One call in the place of two, and of two in the backward pass.
        """
        if z.dtype != self.weight.dtype and compute_dtype(z) != self.dtype:
            # The maps have gone over to another dtype since.
            return activation_spatial_dreg(z, kind, self.tap_sq())
        y, jac_sq = operators.forward(z, self.weight, self.factor, *self.windows, kind)
        return y, jac_sq


def convolution_in_front(
    weight: Tensor, x: Tensor, stride: WholeNumbers, padding: Padding, dilation: WholeNumbers, weight_stays: bool
) -> Tensor | ConvolutionInFront:
    """The squares of the weight of a convolution of ``x``, or its weight where one operator can do the rest.

    The weight must then still be there when the activation runs: ``weight_stays``.
    """
    window = weight.shape[2:]
    at_once = (
        not weight_stays
        or in_plain_pytorch(weight)
        or not (weight.is_cpu and x.is_cpu)
        or backends.choose("activation_spatial_dreg", x) != "cpu"
    )
    if at_once:
        return squared_taps(weight, x, geometry(window, stride, padding, dilation))
    size = x.shape[-len(window) :]
    try:
        windows = _windows(size, window, stride, padding, dilation)
    except TypeError:  # lists, or the symbols of a trace, which no cache takes
        windows = _windows.__wrapped__(size, window, stride, padding, dilation)
    return ConvolutionInFront(in_dtype_of_op(weight, x), windows)


# remembered() would look at every number first, in Python; nothing but the attributes of a convolution comes here.
@lru_cache(maxsize=1024)
def _windows(
    size: Sequence[int], window: Sequence[int], stride: WholeNumbers, padding: Padding, dilation: WholeNumbers
) -> Numbers:
    return numbers(size, geometry(window, stride, padding, dilation))


# ---- the forward: (z, weight, factor, size, stride, padding, dilation, kind) ----------------------------------------

_WEIGHTS = "Tensor weight, Tensor? factor"
_WHERE = "int[] size, int[] stride, int[] padding, int[] dilation, str kind"


def _forward(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, jac_sq = definition.convolved_activation_dreg(z, *rest)
    return like_the_input((z,), y), jac_sq


def _forward_fake(z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y, jac_sq = spatial_dreg_fake(z, None)
    return like_the_input((z,), y), jac_sq


def _forward_vjp(
    inputs: tuple[Any, ...], needs: tuple[bool, ...], grads: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    return operators.backward(*inputs[:3], *grads, *inputs[3:], *needs)


def _forward_jvp(inputs: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> Sequence[Tensor]:
    z, weight, factor, *windows, kind = inputs
    sums = squares.forward.definition(weight, *windows)
    tap_sq_dot = _tap_sq_dot(sums, weight, factor, windows, tangents)
    y_dot, jac_sq_dot = maps.forward.jvp((z, weighted(sums, factor), kind), (tangents[0], tap_sq_dot))
    return like_the_input((z,), y_dot), jac_sq_dot


def _tap_sq_dot(
    sums: Tensor, weight: Tensor, factor: Tensor | None, windows: Sequence[Any], changes: Sequence[Tensor | None]
) -> Tensor | None:
    """How the squares change with ``(z, weight, factor)``."""
    _, weight_dot, factor_dot = changes[:3]
    of_weight = None
    if weight_dot is not None:
        of_weight = weighted(squares.forward.jvp((weight, *windows), (weight_dot,))[0], factor)
    return plus(of_weight, None if factor_dot is None else weighted(sums, factor_dot))


# ---- the backward: (z, weight, factor, grad_y, grad_jac_sq, *windows, kind, needs_z, needs_weight, needs_factor) -----
#
# In words of the operators that it stands for:
#   dz, dtap_sq = maps.backward(z, tap_sq, grad_y, grad_jac_sq)      tap_sq = r g
#   dweight = squares.backward(weight, r dtap_sq)                    dfactor_c = Σ_{h,w} g dtap_sq


def _split(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], str, tuple[bool, ...]]:
    """The forward's tensors, the gradients that arrived, the windows, the activation, and which results are wanted."""
    return inputs[:3], inputs[3:5], inputs[5:9], inputs[9], inputs[10:]


def _as_wanted(inputs: tuple[Any, ...], *results: Tensor | None) -> tuple[Tensor, ...]:
    """Each result in its parameter's dtype and layout; empty if it is not wanted."""
    parameters, _, _, _, needs = _split(inputs)
    z = parameters[0]
    finished = []
    for index, (result, parameter, need) in enumerate(zip(results, parameters, needs, strict=True)):
        if not need:
            finished.append(z.new_empty(0))
        else:
            value = torch.zeros_like(parameter) if result is None else result.to(parameter.dtype)
            finished.append(like_the_input((z,), value) if index == 0 else value.contiguous())
    return tuple(finished)


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    (z, weight, factor), grads, windows, kind, _ = _split(inputs)
    sums = squares.forward.definition(weight, *windows)
    dz, dtap_sq = maps.backward.definition(z, weighted(sums, factor), *grads, kind, True, True)
    dweight = squares.backward.definition(weight, weighted(dtap_sq, factor), *windows)
    return _as_wanted(inputs, dz, dweight, None if factor is None else sum_over_trailing(dtap_sq * sums))


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    parameters, _, _, _, needs = _split(inputs)
    z = parameters[0]
    return tuple(
        z.new_empty(0)
        if not need
        else like_the_input((z,), torch.empty_like(z))
        if index == 0
        else torch.empty_like(parameter, memory_format=torch.contiguous_format)
        for index, (parameter, need) in enumerate(zip(parameters, needs, strict=True))
    )


def _backward_vjp(
    inputs: tuple[Any, ...], needs: tuple[bool, ...], cotangents: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    (z, weight, factor), grads, windows, kind, wanted = _split(inputs)
    of_z, of_weight, of_factor = (value if want else None for value, want in zip(cotangents, wanted, strict=True))
    sums = squares.forward(weight, *windows)
    tap_sq = weighted(sums, factor)
    _, dtap_sq = maps.backward(z, tap_sq, *grads, kind, False, True)
    weight_terms: list[Tensor | None] = []
    sums_terms: list[Tensor | None] = []
    factor_terms: list[Tensor | None] = []
    dtap_sq_terms: list[Tensor | None] = []
    if of_weight is not None:
        arguments = (weight, weighted(dtap_sq, factor), *windows)
        of_weight_again, of_scaled = squares.backward.vjp(arguments, (True, True), (of_weight,))
        assert of_scaled is not None
        weight_terms.append(of_weight_again)
        dtap_sq_terms.append(weighted(of_scaled, factor))
        factor_terms.append(sum_over_trailing(of_scaled * dtap_sq))
    if of_factor is not None:
        sums_terms.append(weighted(dtap_sq, of_factor))
        dtap_sq_terms.append(weighted(sums, of_factor))
    cotangents_of_maps = (of_z, plus(*dtap_sq_terms))
    results = maps.backward.vjp((z, tap_sq, *grads, kind, wanted[0], True), (True,) * 4, cotangents_of_maps)
    z_again, of_tap_sq, of_grad_y, of_grad_jac_sq = results
    if of_tap_sq is not None:
        sums_terms.append(weighted(of_tap_sq, factor))
        factor_terms.append(sum_over_trailing(of_tap_sq * sums))
    of_sums = plus(*sums_terms)
    if of_sums is not None:
        weight_terms.extend(squares.forward.vjp((weight, *windows), (True,), (of_sums,)))
    return (
        z_again,
        cast(plus(*weight_terms), weight),
        cast(plus(*factor_terms), factor),
        of_grad_y,
        of_grad_jac_sq,
    )


def _backward_jvp(inputs: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> Sequence[Tensor]:
    (z, weight, factor), grads, windows, kind, _ = _split(inputs)
    z_dot, weight_dot, factor_dot, *grads_dot = tangents
    sums = squares.forward.definition(weight, *windows)
    tap_sq = weighted(sums, factor)
    tap_sq_dot = _tap_sq_dot(sums, weight, factor, windows, tangents)
    _, dtap_sq = maps.backward.definition(z, tap_sq, *grads, kind, False, True)
    arguments = (z, tap_sq, *grads, kind, True, True)
    dz_dot, dtap_sq_dot = maps.backward.jvp(arguments, (z_dot, tap_sq_dot, *grads_dot))
    scaled_dot = plus(weighted(dtap_sq_dot, factor), None if factor_dot is None else weighted(dtap_sq, factor_dot))
    arguments_of_squares = (weight, weighted(dtap_sq, factor), *windows)
    (dweight_dot,) = squares.backward.jvp(arguments_of_squares, (weight_dot, scaled_dot))
    dfactor_dot = sum_over_trailing(dtap_sq_dot * sums)
    if weight_dot is not None:
        dfactor_dot = dfactor_dot + sum_over_trailing(
            dtap_sq * squares.forward.jvp((weight, *windows), (weight_dot,))[0]
        )
    return _as_wanted(inputs, dz_dot, dweight_dot, dfactor_dot)


def _value_stands_in(inputs: tuple[Any, ...]) -> bool:
    return inputs[7] in SAME_DERIVATIVES_AT_VALUE


operators = OperatorPair(
    Operator(
        f"convolved_activation_dreg(Tensor z, {_WEIGHTS}, {_WHERE}) -> (Tensor, Tensor)",
        definition=_forward,
        fake=_forward_fake,
        vjp=_forward_vjp,
        jvp=_forward_jvp,
        arrange=as_it_is,
        stands_in=_value_stands_in,
    ),
    Operator(
        f"convolved_activation_dreg_backward(Tensor z, {_WEIGHTS}, Tensor? grad_y, Tensor? grad_jac_sq, {_WHERE}, "
        "bool needs_z, bool needs_weight, bool needs_factor) -> (Tensor, Tensor, Tensor)",
        definition=_backward,
        fake=_backward_fake,
        vjp=_backward_vjp,
        jvp=_backward_jvp,
        arrange=as_it_is,
    ),
)

"""The registered operators, and the functions by which the ops get the squares of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainzrule_kernels import _distributed, backends
from chainzrule_kernels._registration import Operator
from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.ops._convolution import Geometry, in_dtype
from chainzrule_kernels.ops._operator_pairs import OperatorPair
from chainzrule_kernels.ops.squared_weights import definition


def squared_row_norms(weight: Tensor, z: Tensor) -> Tensor:
    """:func:`definition.squared_row_norms`, by a kernel where there is one."""
    if in_plain_pytorch(weight) or weight.numel() < _WORTH_AN_OPERATOR:
        return definition.squared_row_norms(weight, z)
    return _forward_operator(in_dtype_of_op(weight, z), *_EVERYTHING)


def squared_taps(weight: Tensor, x: Tensor, where: Geometry) -> Tensor:
    """:func:`definition.squared_taps`, by a kernel where there is one."""
    if in_plain_pytorch(weight):
        return definition.squared_taps(weight, x, where)
    return _forward_operator(in_dtype_of_op(weight, x), *numbers(x.shape[x.dim() - len(where.stride) :], where))


def numbers(size: Sequence[int], where: Geometry) -> Numbers:
    """The windows on an image as the operators take them: sizes, strides, padding before and behind, dilation."""
    if not where.padded:
        return _EVERYTHING
    return size, where.stride, tuple(width for pair in where.padding for width in pair), where.dilation


_WORTH_AN_OPERATOR = 2**16
"""The size of a linear map's weight from which the operator takes less time than the product and the sum of PyTorch: it
makes two passes less and costs a call from C++ to Python more."""

Numbers = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]

_EVERYTHING: Numbers = ((), (), (), ())
"""The sizes, strides, padding and dilation by which every tap counts."""


def in_plain_pytorch(weight: Tensor) -> bool:
    """Whether the definition shall run: the compiler makes one kernel of it, and DTensor knows how to split it."""
    return torch.compiler.is_compiling() or backends.wants_plain_pytorch() or not _distributed.is_plain(weight)


def in_dtype_of_op(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in a dtype of which the sums have the one in which an op on ``x`` computes."""
    if weight.dtype == x.dtype:
        return weight
    dtype = compute_dtype(x)
    return weight if compute_dtype(weight) == dtype else in_dtype(weight, dtype)


# ---- the operators: (weight, size, stride, padding, dilation), by numbers --------------------------------------------


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
    pairs = zip(padding[::2], padding[1::2], strict=True)
    return Geometry(tuple(stride), tuple(pairs), tuple(dilation))


def _products(weight: Tensor, other: Tensor, size: Sequence[int], *where: Sequence[int]) -> Tensor:
    dtype = compute_dtype(weight)
    weight, other = weight.to(dtype), other.to(dtype)
    if not size:
        return definition.row_products(weight, other)
    return definition.tap_products(weight, other, size, _geometry(*where))


def _squared(weight: Tensor, *where: Sequence[int]) -> Tensor:
    return _products(weight, weight, *where)


def _squared_fake(weight: Tensor, size: Sequence[int], *where: Sequence[int]) -> Tensor:
    out = _geometry(*where).out_size(size, weight.shape[2:]) if size else []
    return weight.new_empty((weight.shape[0], *out), dtype=compute_dtype(weight))


def _squared_vjp(inputs: tuple[Any, ...], needs: tuple[bool, ...], grads: Sequence[Tensor | None]) -> tuple[Tensor]:
    (grad,) = grads
    return (_backward_operator(inputs[0], grad, *inputs[1:]),)


def _squared_jvp(inputs: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> tuple[Tensor]:
    (change,) = tangents
    assert change is not None
    return (2 * _products(inputs[0], change, *inputs[1:]),)


def _backward(weight: Tensor, grad: Tensor, size: Sequence[int], *where: Sequence[int]) -> Tensor:
    """``2 W g``, with the sum of ``g`` over the windows in which the tap falls inside the image."""
    dtype = compute_dtype(weight)
    if size:
        of_taps = definition.of_taps(grad.to(dtype), weight.shape[2:], size, _geometry(*where)).unsqueeze(1)
    else:
        of_taps = grad.to(dtype).view(-1, *(1,) * (weight.dim() - 1))
    return (2 * (weight.to(dtype) * of_taps)).to(weight.dtype)


def _backward_fake(weight: Tensor, grad: Tensor, *where: Sequence[int]) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _backward_vjp(
    inputs: tuple[Any, ...], needs: tuple[bool, ...], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    weight, grad, *where = inputs
    (cotangent,) = cotangents
    assert cotangent is not None
    return (
        _backward_operator(cotangent, grad, *where).to(weight.dtype) if needs[0] else None,
        (2 * _products(weight, cotangent, *where)).to(grad.dtype) if needs[1] else None,
    )


def _backward_jvp(inputs: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> tuple[Tensor]:
    weight, grad, *where = inputs
    weight_change, grad_change = tangents
    terms = []
    if weight_change is not None:
        terms.append(_backward_operator(weight_change, grad, *where))
    if grad_change is not None:
        terms.append(_backward_operator(weight, grad_change, *where))
    return (sum(terms[1:], terms[0]).to(weight.dtype),)


_WHERE = "int[] size, int[] stride, int[] padding, int[] dilation"
_forward_operator = Operator(
    f"squared_taps(Tensor weight, {_WHERE}) -> Tensor",
    definition=_squared,
    fake=_squared_fake,
    vjp=_squared_vjp,
    jvp=_squared_jvp,
)
_backward_operator = Operator(
    f"squared_taps_backward(Tensor weight, Tensor grad, {_WHERE}) -> Tensor",
    definition=_backward,
    fake=_backward_fake,
    vjp=_backward_vjp,
    jvp=_backward_jvp,
)
operators = OperatorPair(_forward_operator, _backward_operator)

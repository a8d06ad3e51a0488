"""A linear layer with its activation and Jacobian norm as one operator, for GPUs (SPEC 2.2).

On the CPU the product is the library's and the pass over ``z`` an operator of its own; here the kernel decides, since
one that computes the function in the epilogue of the product never reads ``z``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chainzrule_kernels._registration import Operator
from chainzrule_kernels.functions import Activation, Polynomial, ScalarFunction, compute_dtype
from chainzrule_kernels.ops import _dreg_calculus, _launch
from chainzrule_kernels.ops._operator_pairs import OperatorPair
from chainzrule_kernels.ops._terms import plus


def operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What :func:`linear_in_dtype_of_x` multiplies: everything in the dtype of ``x`` or of autocast."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    # Rounded to the dtype of x first, as by linear_in_dtype_of_x.
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def keeps_z(*tensors: Tensor | None) -> bool:
    """Whether a backward pass over these will want ``z``."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def why_no_epilogue(x: Tensor, weight: Tensor, coeffs: Tensor | None, keep_z: bool) -> str | None:
    """:func:`chainzrule_kernels.ops._launch.why_no_epilogue` for these tensors, ``x`` and ``weight`` of one dtype."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return _launch.why_no_epilogue(
        weight.shape[0],
        weight.shape[1],
        x.element_size(),
        tensor_cores=half or (x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"),
        degree_per_channel=coeffs.shape[0] - 1 if coeffs is not None and coeffs.dim() == 2 else 0,
        keeps_z=keep_z,
    )


def how(x: Tensor, weight: Tensor, bias: Tensor | None, coeffs: Tensor | None) -> str:
    """How the Triton kernels run a linear op on these arguments, in words."""
    keep_z = keeps_z(x, weight, bias, coeffs)
    x, weight, _ = operands(x, weight, bias)
    reason = why_no_epilogue(x, weight, coeffs, keep_z)
    if reason is None:
        return "one kernel: the function and the norm in the epilogue of the matrix product"
    return f"the library's matrix product, then one fused pass: {reason}"


def register_linear(name: str, *, has_coeffs: bool, dreg: OperatorPair) -> Operator:
    """Register ``name(x, weight, bias, row_sq, coeffs | kind, keep_z) -> (y, jac_sq, z)``.

    ``x`` and the parameters of the map have one dtype; ``row_sq`` holds the squared norms of the rows of the weight
    before it was rounded to that dtype. ``z`` is saved for the backward, and empty unless ``keep_z``; a derivative that
    is asked for all the same computes it again.

    Args:
        name: of the operator.
        has_coeffs: whether the function is a polynomial with a tensor ``coeffs``, or an activation with a string
            ``kind``.
        dreg: the operators of the pass over ``z``.
    """

    def function_at(inputs: Sequence[Any]) -> ScalarFunction:
        return Polynomial(inputs[4].to(compute_dtype(inputs[0]))) if has_coeffs else Activation(inputs[4])

    def selected(function: Any) -> tuple[Any, ...]:
        """The function as the operators of ``dreg`` take it: ``coeffs`` and that it is not rectified, or ``kind``."""
        return (function, False) if has_coeffs else (function,)

    def definition(
        x: Tensor, weight: Tensor, bias: Tensor | None, row_sq: Tensor, function: Any, keep_z: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = F.linear(x, weight, bias)
        y, jac_sq, _ = dreg.forward.definition(z, row_sq, *selected(function), False)
        return y, jac_sq, z if keep_z else z.new_empty(0)

    def fake(
        x: Tensor, weight: Tensor, bias: Tensor | None, row_sq: Tensor, function: Any, keep_z: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        return (
            y,
            x.new_empty(x.shape[:-1], dtype=compute_dtype(x)),
            torch.empty_like(y) if keep_z else x.new_empty(0),
        )

    def kept(inputs: Sequence[Any], z: Tensor) -> Tensor:
        return z if inputs[5] else F.linear(*inputs[:3])

    def vjp(
        inputs: tuple[Any, ...], needs: tuple[bool, ...], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        x, weight, _, row_sq, function, keep_z, saved_z = inputs
        z = kept(inputs, saved_z)
        of_map = any(needs[:3])
        *coeffs, selector = selected(function)
        dz, *others = dreg.backward(z, row_sq, *coeffs, grads[0], grads[1], None, selector, of_map, *needs[3:])
        if not of_map:
            return (None, None, None, *others)
        if keep_z and grads[2] is not None:
            dz = dz + grads[2]
        rows = dz.reshape(-1, weight.shape[0])
        return (
            dz @ weight if needs[0] else None,
            rows.mT @ x.reshape(-1, weight.shape[1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
            *others,
        )

    def jvp(inputs: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> Sequence[Tensor]:
        x, weight, _, row_sq, _, keep_z, saved_z = inputs
        z = kept(inputs, saved_z)
        x_dot, weight_dot, bias_dot, row_sq_dot = tangents[:4]
        z_dot = plus(
            None if x_dot is None else F.linear(x_dot, weight),
            None if weight_dot is None else F.linear(x, weight_dot),
            None if bias_dot is None else bias_dot.expand_as(z),
        )
        dtype = compute_dtype(x)

        def computed(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(dtype)

        changes = (computed(z_dot), computed(row_sq_dot), computed(tangents[4]) if has_coeffs else None)
        y_dot, jac_sq_dot, _ = _dreg_calculus.jvp(function_at(inputs), z.to(dtype), row_sq.to(dtype), changes)
        results = (y_dot, jac_sq_dot, z_dot if keep_z else None)
        return tuple(
            torch.zeros_like(output) if result is None else result.to(output.dtype)
            for result, output in zip(results, fake(*inputs[:6]), strict=True)
        )

    function_schema = "Tensor coeffs" if has_coeffs else "str kind"
    return Operator(
        f"{name}(Tensor x, Tensor weight, Tensor? bias, Tensor row_sq, {function_schema}, bool keep_z) "
        "-> (Tensor, Tensor, Tensor)",
        definition=definition,
        fake=fake,
        vjp=vjp,
        jvp=jvp,
        saves=(2,),
    )

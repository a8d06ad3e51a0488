"""A forward operator and the backward operator that its vjp calls, for any scalar function.

The ops with a Jacobian norm, ``*_dreg``, ``*_spatial_dreg`` and ``*_tangent``, have the same shape: three
differentiable inputs ``z``, a companion (``row_sq``, ``tap_sq`` or ``z_dot``) and ``coeffs``, and two or three outputs.
What else selects the function is a constant: for polynomials whether they are ``rectified``, that is ``p(relu(z))``;
the fixed activations have a string ``kind``, and no ``coeffs``. So one builder registers all six pairs, and polynomials
and activations cannot drift apart.

An operator always returns the same number of tensors: a result that was not asked for is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from chainzrule_kernels._registration import Arrange, Operator, contiguous
from chainzrule_kernels.functions import (
    SAME_DERIVATIVES_AT_VALUE,
    Activation,
    ScalarFunction,
    compute_dtype,
    polynomial_of,
)
from chainzrule_kernels.ops._dreg_calculus import Optional3
from chainzrule_kernels.ops._terms import cast


class Calculus(Protocol):
    """The derivative formulas of an op (``_dreg_calculus`` and its like), all in the compute dtype.

    They speak of three outputs; what belongs to a third that the op has not is absent.
    """

    def backward(self, function: ScalarFunction, z: Any, companion: Any, grads: Optional3) -> Optional3: ...
    def jvp(self, function: ScalarFunction, z: Any, companion: Any, changes: Optional3) -> Optional3: ...
    def backward_vjp(
        self, function: ScalarFunction, z: Any, companion: Any, grads: Optional3, cotangents: Optional3
    ) -> tuple[Tensor | None, ...]: ...
    def backward_jvp(
        self,
        function: ScalarFunction,
        z: Any,
        companion: Any,
        grads: Optional3,
        changes: Optional3,
        grads_changes: Optional3,
    ) -> Optional3: ...


@dataclass(frozen=True)
class OperatorPair:
    """The forward operator and the backward operator that its vjp calls."""

    forward: Operator
    backward: Operator


def register_pair(
    name: str,
    *,
    companion: str,
    has_coeffs: bool,
    flags: str,
    grads: tuple[str, ...],
    definition: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    calculus: Calculus,
    arrange: Arrange = contiguous,
) -> OperatorPair:
    """Register ``name(z, companion, coeffs, rectified[, flags])`` or ``name(z, companion, kind[, flags])``, and
    ``name_backward``.

    Args:
        name: of the forward operator.
        companion: the schema of the second tensor, such as ``"Tensor? row_sq"``.
        has_coeffs: whether the function is a polynomial with a tensor ``coeffs`` and a bool ``rectified``, or an
            activation with a string ``kind``.
        flags: the schema of what else the forward takes, ``"bool return_derivative"`` or nothing.
        grads: the names of the gradients that arrive for the outputs.
        definition: the forward in plain PyTorch, with the operator's signature.
        fake: ``(z, companion, *flags)``: the forward's outputs, empty.
        calculus: the derivative formulas.
        arrange: how the results of both operators lie in memory, as for :class:`Operator`.
    """
    parameter_count = 3 if has_coeffs else 2
    companion_name = companion.split()[-1]
    selector = "bool rectified" if has_coeffs else "str kind"
    # Where the selector stands: behind the tensors, which in the backward are followed by the gradients.
    in_forward, in_backward = parameter_count, parameter_count + len(grads)

    def function_at(inputs: Sequence[Any], selected: Any) -> ScalarFunction:
        if has_coeffs:
            return polynomial_of(inputs[2].to(compute_dtype(inputs[0])), selected)
        return Activation(selected)

    def value_stands_in(inputs: tuple[Any, ...]) -> bool:
        return not has_coeffs and inputs[2] in SAME_DERIVATIVES_AT_VALUE

    def computed(z: Tensor, values: Sequence[Tensor | None]) -> Any:
        """The tensors in the dtype in which an op on ``z`` computes; absent ones stay absent."""
        dtype = compute_dtype(z)
        return tuple(None if value is None else value.to(dtype) for value in values)

    def arguments_of(inputs: Sequence[Any], selector_index: int) -> tuple[ScalarFunction, Any, Any]:
        """The function, and ``z`` and its companion as the calculus wants them."""
        z, companion_value = computed(inputs[0], inputs[:2])
        return function_at(inputs, inputs[selector_index]), z, companion_value

    def triple(values: Sequence[Tensor | None]) -> Optional3:
        """What belongs to ``(z, companion, coeffs)`` or to the outputs, absent for a third that there is not."""
        return values[0], values[1], values[2] if len(values) > 2 else None

    # ---- the forward's derivatives --------------------------------------------------------------------------------

    def forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
        return fake(*inputs[:2], *inputs[in_forward + 1 :])

    def of_outputs(inputs: Sequence[Any], values: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """What belongs to the outputs, absent for a ``derivative`` that was not asked for."""
        return values[: len(grads)] if all(inputs[in_forward + 1 :]) else (*values[:2], None)

    def forward_vjp(
        inputs: tuple[Any, ...], needs: tuple[bool, ...], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        return backward_operator(*inputs[:parameter_count], *of_outputs(inputs, grads), inputs[in_forward], *needs)

    def forward_jvp(inputs: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> Sequence[Tensor]:
        z = inputs[0]
        changes = triple(computed(z, tangents))
        results = of_outputs(inputs, calculus.jvp(*arguments_of(inputs, in_forward), changes))
        return tuple(
            torch.zeros_like(output) if result is None else result.to(output.dtype)
            for result, output in zip(results, forward_fake(*inputs), strict=True)
        )

    # ---- the backward: (z, companion[, coeffs], grads, selector, one "needs" for each parameter) ---------------------

    def split(inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[bool]]:
        """The forward's tensors, the gradients that arrived, and which results are wanted."""
        arrived = inputs[parameter_count : parameter_count + len(grads)]
        return inputs[:parameter_count], arrived, inputs[-parameter_count:]

    def as_wanted(results: Sequence[Tensor | None], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Each result in its parameter's dtype; zeros where nothing arrived that it depends on; empty if not wanted."""
        parameters, _, needs = split(inputs)
        finished: list[Tensor] = []
        for result, parameter, need in zip(results, parameters, needs, strict=False):
            if not need:
                finished.append(inputs[0].new_empty(0))
            elif result is None:
                finished.append(torch.zeros_like(parameter))
            else:
                finished.append(result.to(parameter.dtype))
        return tuple(finished)

    def backward_definition(*inputs: Any) -> tuple[Tensor, ...]:
        _, arrived, _ = split(inputs)
        z = inputs[0]
        results = calculus.backward(*arguments_of(inputs, in_backward), triple(computed(z, arrived)))
        return as_wanted(results, inputs)

    def backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
        parameters, _, needs = split(inputs)
        return tuple(
            torch.empty_like(parameter, memory_format=torch.contiguous_format) if need else inputs[0].new_empty(0)
            for parameter, need in zip(parameters, needs, strict=True)
        )

    def backward_vjp(
        inputs: tuple[Any, ...], needs: tuple[bool, ...], cotangents: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        parameters, arrived, wanted = split(inputs)
        z = inputs[0]
        # The cotangent of a result that was not wanted belongs to an empty tensor.
        cotangents = [value if want else None for value, want in zip(cotangents, wanted, strict=True)]
        results = calculus.backward_vjp(
            *arguments_of(inputs, in_backward), triple(computed(z, arrived)), triple(computed(z, cotangents))
        )
        results = (*results[:parameter_count], *results[3 : 3 + len(grads)])
        return tuple(cast(result, like) for result, like in zip(results, (*parameters, *arrived), strict=True))

    def backward_jvp(inputs: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> Sequence[Tensor]:
        _, arrived, _ = split(inputs)
        z = inputs[0]
        changes = computed(z, tangents)
        results = calculus.backward_jvp(
            *arguments_of(inputs, in_backward),
            triple(computed(z, arrived)),
            triple(changes[:parameter_count]),
            triple(changes[parameter_count:]),
        )
        return as_wanted(results, inputs)

    def tensors(count: int) -> str:
        return ", ".join(["Tensor"] * count)

    parameters = ["Tensor z", companion, *(["Tensor coeffs"] if has_coeffs else [])]
    forward_operator = Operator(
        f"{name}({', '.join([*parameters, selector, *([flags] if flags else [])])}) -> ({tensors(len(grads))})",
        definition=definition,
        fake=forward_fake,
        vjp=forward_vjp,
        jvp=forward_jvp,
        arrange=arrange,
        stands_in=value_stands_in,
    )
    arguments = [
        *parameters,
        *(f"Tensor? {grad}" for grad in grads),
        selector,
        "bool needs_z",
        f"bool needs_{companion_name}",
        *(["bool needs_coeffs"] if has_coeffs else []),
    ]
    backward_operator = Operator(
        f"{name}_backward({', '.join(arguments)}) -> ({tensors(parameter_count)})",
        definition=backward_definition,
        fake=backward_fake,
        vjp=backward_vjp,
        jvp=backward_jvp,
        arrange=arrange,
    )
    return OperatorPair(forward_operator, backward_operator)


def dreg_fake(z: Tensor, row_sq: Tensor | None, return_derivative: bool) -> tuple[Tensor, ...]:
    """Empty ``(y, jac_sq, derivative)``."""
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    jac_sq = z.new_empty(z.shape[:-1], dtype=compute_dtype(z))
    return y, jac_sq, torch.empty_like(y) if return_derivative else z.new_empty(0)


def spatial_dreg_fake(z: Tensor, tap_sq: Tensor | None) -> tuple[Tensor, ...]:
    """Empty ``(y, jac_sq)``."""
    return torch.empty_like(z), z.new_empty(z.shape[:1], dtype=compute_dtype(z))


def tangent_fake(z: Tensor, z_dot: Tensor) -> tuple[Tensor, ...]:
    """Empty ``(y, y_dot, tangent_sq)``."""
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    y_dot = torch.empty_like(z_dot, memory_format=torch.contiguous_format)
    return y, y_dot, z.new_empty(z_dot.shape[:-1], dtype=compute_dtype(z))

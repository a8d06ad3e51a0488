"""Derivatives of every order, in float64: gradcheck, gradgradcheck, gradient penalties, torch.func, forward mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.func
from shared import FULLEST, REPRESENTATIVE, assert_same, each, scalar
from torch import Tensor
from torch.autograd import forward_ad

import chainzrule_kernels as ck
from chainzrule_kernels.testing.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("target")

# gradcheck of all degrees would repeat itself; the extremes are enough beside degree 3.
CHECKED = [
    case
    for case in CASES
    if case.representative or not any(f"degree {degree}," in case.form for degree in (2, 4, 5, 6, 7))
]


def _doubles(
    case: Case, device: str = "cpu", shape: tuple[int, ...] = (2, 3), requires_grad: bool = False
) -> dict[str, Tensor]:
    return case.arguments(shape, torch.float64, device=device, requires_grad=requires_grad)


def _by_position(case: Case, function: Callable[[dict[str, Tensor]], Any], names: list[str]) -> Callable[..., Any]:
    def called(*values: Tensor) -> Any:
        return function(dict(zip(names, values, strict=True)))

    return called


@each(CHECKED)
def test_gradcheck(case: Case, device: str) -> None:
    tensors = _doubles(case, device, requires_grad=True)
    function = _by_position(case, case, list(tensors))
    assert torch.autograd.gradcheck(
        function,
        tuple(tensors.values()),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


@each(REPRESENTATIVE)
def test_gradgradcheck(case: Case, device: str) -> None:
    tensors = _doubles(case, device, shape=(2, 2), requires_grad=True)
    function = _by_position(case, case, list(tensors))
    assert torch.autograd.gradgradcheck(
        function,
        tuple(tensors.values()),
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_undefined_grad=True,
    )


def _penalised(
    function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], tensors: dict[str, Tensor], weight: float
) -> list[Tensor]:
    """The gradient of a loss plus ``weight`` times the squared gradient of that loss in the data."""
    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    first = next(iter(leaves))
    loss = scalar(function(leaves))
    (slope,) = torch.autograd.grad(loss, leaves[first], create_graph=True)
    return list(torch.autograd.grad(loss + weight * slope.square().sum(), tuple(leaves.values())))


@each(CASES)
def test_r06_a_penalty_on_the_gradient_keeps_its_term(case: Case, device: str) -> None:
    tensors = _doubles(case, device, shape=(4, 7))
    found = _penalised(case, tensors, weight=0.3)
    assert_same(found, _penalised(case.reference, tensors, weight=0.3), rtol=1e-9, atol=1e-8)
    without = _penalised(case, tensors, weight=0.0)
    linear = "degree 1," in case.form or case.constants.get("kind") == "relu"
    if not linear:
        assert not torch.allclose(found[0], without[0])
    # Of a linear function the penalty still depends on the coefficients or the incoming data, if there are any.
    elif len(found) > 1 and case.op != "activation_dreg":
        assert any(not torch.allclose(one, other) for one, other in zip(found, without, strict=True))


def _two_derivatives(result: Tensor, leaf: Tensor) -> list[Tensor]:
    """Of ``sin`` of the result, and of ``sin`` of that; zeros where nothing depends on the leaf."""
    found = []
    for _ in range(2):
        if result.requires_grad:
            (result,) = torch.autograd.grad(result.sin().sum(), leaf, create_graph=True, materialize_grads=True)
        else:
            result = torch.zeros_like(leaf)
        found.append(result.detach())
    return found


@each(FULLEST)
def test_r06_each_gradient_alone(case: Case, device: str) -> None:
    # With only one argument differentiable, and only one result used, nothing may be skipped or assumed present.
    tensors = _doubles(case, device, shape=(3, 4))
    for name in tensors:
        for index in range(len(case.outputs)):
            found = []
            for function in (case, case.reference):
                arguments = {key: value.clone() for key, value in tensors.items()}
                arguments[name].requires_grad_()
                found.append(_two_derivatives(function(arguments)[index], arguments[name]))
            assert_same(*found, rtol=1e-9, atol=1e-9)


def test_r06_the_backward_of_a_mixed_loss_accumulates(device: str) -> None:
    # As a training step does it: .backward() through both terms, into .grad.
    case = FULLEST[0]
    tensors = _doubles(case, device, shape=(4, 5), requires_grad=True)
    expected = _penalised(case.reference, tensors, weight=1.0)
    loss = scalar(case(tensors))
    (slope,) = torch.autograd.grad(loss, next(iter(tensors.values())), create_graph=True)
    (loss + slope.square().sum()).backward()
    assert_same([value.grad for value in tensors.values()], expected, rtol=1e-9, atol=1e-9)


# ---- R18: torch.func and forward mode -----------------------------------------------------------------------------


def _loss(function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], names: list[str]) -> Callable[..., Tensor]:
    return lambda *values: scalar(function(dict(zip(names, values, strict=True))))


def _all_leaves(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def _everywhere(transform: Callable[..., Any], function: Callable[..., Tensor], count: int) -> Any:
    return transform(function, argnums=tuple(range(count)))


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], int], Callable[..., Any]]] = {
    "grad": lambda f, n: _everywhere(torch.func.grad, f, n),
    "jacrev": lambda f, n: _everywhere(torch.func.jacrev, f, n),
    "jacfwd": lambda f, n: _everywhere(torch.func.jacfwd, f, n),
    "hessian": lambda f, n: _everywhere(torch.func.hessian, f, n),
    "jacrev of jacrev": lambda f, n: _everywhere(torch.func.jacrev, _everywhere(torch.func.jacrev, f, n), n),
    "jacrev of jacfwd": lambda f, n: _everywhere(torch.func.jacrev, _everywhere(torch.func.jacfwd, f, n), n),
    "jacfwd of jacfwd": lambda f, n: _everywhere(torch.func.jacfwd, _everywhere(torch.func.jacfwd, f, n), n),
    "third derivative": lambda f, n: torch.func.jacrev(torch.func.jacfwd(torch.func.jacrev(f))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@each(FULLEST)
def test_r18_transforms(case: Case, transform: str, device: str) -> None:
    # Third derivatives of every weight of a convolution would take minutes.
    tensors = _doubles(case, device, shape=(1, 1) if case.op.startswith("polynomial_conv") else (2, 3))
    names = list(tensors)
    results = [
        _all_leaves(TRANSFORMS[transform](_loss(function, names), len(names))(*tensors.values()))
        for function in (case, case.reference)
    ]
    assert_same(*results, rtol=1e-8, atol=1e-8)
    assert any(value.abs().max() > 1e-6 for value in results[0])


@each(REPRESENTATIVE)
def test_r18_jvp(case: Case, device: str) -> None:
    tensors = _doubles(case, device, shape=(3, 5))
    directions = case.arguments((3, 5), torch.float64, device=device, seed=2, parameter_seed=2)
    results = []
    for function in (case, case.reference):
        called = _by_position(case, function, list(tensors))
        outputs, tangents = torch.func.jvp(called, tuple(tensors.values()), tuple(directions.values()))
        results.append([*outputs, *tangents])
    assert_same(*results, rtol=1e-10, atol=1e-10)
    assert all(tangent.abs().max() > 0 for tangent in results[0][len(case.outputs) : len(case.outputs) + 1])


@each(REPRESENTATIVE)
def test_r18_each_tangent_alone(case: Case, device: str) -> None:
    tensors = _doubles(case, device, shape=(3, 5))
    for name in tensors:
        found = []
        for function in (case, case.reference):
            called = lambda value, name=name, function=function: function({**tensors, name: value})  # noqa: E731
            outputs, tangents = torch.func.jvp(called, (tensors[name],), (torch.ones_like(tensors[name]),))
            found.append([*outputs, *tangents])
        assert_same(*found, rtol=1e-10, atol=1e-10)


@each(REPRESENTATIVE)
def test_r18_dual_numbers_under_no_grad(case: Case, device: str) -> None:
    tensors = _doubles(case, device, shape=(3, 5))
    first = next(iter(tensors))
    found = []
    for function in (case, case.reference):
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(tensors[first], torch.ones_like(tensors[first]))
            results = function({**tensors, first: dual})
            tangents = [forward_ad.unpack_dual(result).tangent for result in results]
            found.append([torch.zeros_like(r) if t is None else t for t, r in zip(tangents, results, strict=True)])
    assert_same(*found, rtol=1e-10, atol=1e-10)
    assert found[0][0].abs().max() > 0


def _members(
    case: Case, device: str, shape: tuple[int, ...]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], tuple[int | None, ...]]:
    """Several draws of the data with the same parameters; the same stacked; and the dimensions to map over."""
    members = [case.arguments(shape, torch.float64, device=device, seed=seed) for seed in range(4)]
    data = {argument.name for argument in case.tensors if argument.is_data}
    stacked = {
        name: torch.stack([member[name] for member in members]) if name in data else value
        for name, value in members[0].items()
    }
    return members, stacked, tuple(0 if name in data else None for name in stacked)


@each(REPRESENTATIVE)
def test_r18_vmap_over_the_data(case: Case, device: str) -> None:
    members, stacked, in_dims = _members(case, device, (3, 5))
    found = torch.func.vmap(_by_position(case, case, list(stacked)), in_dims=in_dims)(*stacked.values())
    expected = [torch.stack(results) for results in zip(*(case.reference(member) for member in members), strict=True)]
    assert_same(found, expected, rtol=1e-10, atol=1e-10)


@each(FULLEST)
def test_r18_vmap_over_the_parameters(case: Case, device: str) -> None:
    # An ensemble: one set of parameters for each member, the same data.
    members = [case.arguments((3, 5), torch.float64, device=device, parameter_seed=seed) for seed in range(3)]
    data = {argument.name for argument in case.tensors if argument.is_data}
    stacked = [
        members[0][name] if name in data else torch.stack([member[name] for member in members]) for name in members[0]
    ]
    in_dims = tuple(None if name in data else 0 for name in members[0])
    if all(dim is None for dim in in_dims):
        in_dims, stacked = (0, *in_dims[1:]), [torch.stack([stacked[0]] * 3), *stacked[1:]]
    found = torch.func.vmap(_by_position(case, case, list(members[0])), in_dims=in_dims)(*stacked)
    for index, member in enumerate(members):
        assert_same([result[index] for result in found], case.reference(member), rtol=1e-10, atol=1e-10)


@each(FULLEST)
def test_r18_per_sample_gradients(case: Case, device: str) -> None:
    _, stacked, in_dims = _members(case, device, (5,))
    names = list(stacked)
    results = []
    for function in (case, case.reference):
        gradient = torch.func.grad(_loss(function, names), argnums=tuple(range(len(names))))
        results.append(list(torch.func.vmap(gradient, in_dims=in_dims)(*stacked.values())))
    assert_same(*results, rtol=1e-9, atol=1e-9)


@each(FULLEST)
def test_r18_gradient_of_vmap(case: Case, device: str) -> None:
    _, stacked, in_dims = _members(case, device, (5,))
    names = list(stacked)

    def summed(function: Callable[..., Any], *values: Tensor) -> Tensor:
        return torch.func.vmap(_loss(function, names), in_dims=in_dims)(*values).sum()

    results = [
        list(torch.func.grad(partial(summed, function), argnums=tuple(range(len(names))))(*stacked.values()))
        for function in (case, case.reference)
    ]
    assert_same(*results, rtol=1e-9, atol=1e-9)


def test_r18_the_bare_operator_under_a_transform(device: str) -> None:
    # What torch.compile leaves in a graph; silent zeros would be the danger.
    z = torch.randn(2, 3, dtype=torch.float64, device=device)
    coeffs = torch.tensor([0.3, -0.7, 0.2, 0.5], dtype=torch.float64, device=device)

    def operator(z: Tensor, coeffs: Tensor) -> Tensor:
        return torch.ops.chainzrule_kernels.polynomial(z, coeffs, False)

    found = torch.func.jvp(operator, (z, coeffs), (z, coeffs))
    expected = torch.func.jvp(ck.reference.polynomial, (z, coeffs), (z, coeffs))
    assert_same(found, expected)
    assert found[1].abs().max() > 0


# ---- the norms by their definition, from Jacobians ------------------------------------------------------------------


def _rows_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of ``function`` at each row of ``x``: ``(batch, out, in)``."""
    return torch.func.vmap(torch.func.jacrev(function))(x)


@each([case for case in REPRESENTATIVE if case.op.startswith("linear_")])
def test_jac_sq_is_the_squared_norm_of_the_layers_jacobian(case: Case, device: str) -> None:
    tensors = _doubles(case, device, shape=(4, 5))
    jacobians = _rows_of(lambda x: case.plain_expression({**tensors, "x": x})[0], tensors["x"])
    torch.testing.assert_close(case(tensors)[1], jacobians.square().sum((-1, -2)))


@each([case for case in REPRESENTATIVE if case.op in ("polynomial_dreg", "activation_dreg")])
def test_jac_sq_weighs_the_rows_of_the_jacobian(case: Case, device: str) -> None:
    tensors = _doubles(case, device, shape=(4, 5))
    jacobians = _rows_of(lambda z: case.plain_expression({**tensors, "z": z})[0], tensors["z"])
    row_sq = tensors.get("row_sq", torch.ones(5, dtype=torch.float64, device=device))
    results = case(tensors)
    torch.testing.assert_close(results[1], (jacobians.square() * row_sq[:, None]).sum((-1, -2)))
    if "derivative" in case.outputs:
        torch.testing.assert_close(results[2], jacobians.diagonal(dim1=-2, dim2=-1))


@each([case for case in REPRESENTATIVE if case.op.endswith("_tangent")])
def test_tangents_are_jacobian_vector_products(case: Case, device: str) -> None:
    tensors = _doubles(case, device, shape=(4, 5))
    jacobians = _rows_of(lambda z: case.plain_expression({**tensors, "z": z, "z_dot": z[None]})[0], tensors["z"])
    expected = torch.einsum("bij,tbj->tbi", jacobians, tensors["z_dot"])
    _, y_dot, tangent_sq = case(tensors)
    torch.testing.assert_close(y_dot, expected)
    torch.testing.assert_close(tangent_sq, expected.square().sum(-1))

"""``rectified=True``: the polynomial of ``relu(z)``, against relu and the polynomial one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shared import each
from torch import Tensor

import chainzrule_kernels as ck
from chainzrule_kernels.ops import PUBLIC_OPS
from chainzrule_kernels.testing.accuracy import measure
from chainzrule_kernels.testing.cases import CASES, Case

RECTIFIED = [case for case in CASES if case.constants.get("rectified")]
# One for each op.
FULLEST = list({case.op: case for case in RECTIFIED}.values())
FLOAT64 = {"dtype": torch.float64}


def one_after_the_other(z: Tensor, coeffs: Tensor, row_sq: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``jac_sq`` and the derivative by autograd through ``torch.relu`` and the plain polynomial."""
    y = ck.reference.polynomial(torch.relu(z), coeffs)
    (derivative,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    squares = derivative.square() if row_sq is None else derivative.square() * row_sq
    return y, squares.sum(-1), derivative


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("degree", [1, 3, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_it_is_relu_and_then_the_polynomial(per_channel: bool, degree: int, name: str) -> None:
    z = torch.randn(5, 37, **FLOAT64)
    z[0, :5] = 0.0
    z.requires_grad_()
    coeffs = torch.randn((degree + 1, 37) if per_channel else (degree + 1,), **FLOAT64, requires_grad=True)
    row_sq = torch.rand(37, **FLOAT64, requires_grad=True)
    expected = one_after_the_other(z, coeffs, row_sq)
    with ck.backend(name):
        found = ck.polynomial_dreg(z, coeffs, row_sq, return_derivative=True, rectified=True)
        alone = ck.polynomial(z, coeffs, rectified=True)
    torch.testing.assert_close((*found, alone), (*expected, expected[0]))
    weights = [torch.randn_like(result) for result in found]
    inputs = (z, coeffs, row_sq)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights)
    )
    torch.testing.assert_close(
        torch.autograd.grad(alone, inputs[:2], weights[0]),
        torch.autograd.grad(ck.reference.polynomial(torch.relu(z), coeffs), inputs[:2], weights[0]),
    )


def test_the_corner_and_nan() -> None:
    z = torch.tensor([-1.0, -0.0, 0.0, 2.0, float("nan")], requires_grad=True)
    coeffs = torch.tensor([5.0, 3.0, 1.0], requires_grad=True)
    y, jac_sq, derivative = ck.polynomial_dreg(z[:4], coeffs, return_derivative=True, rectified=True)
    assert y.tolist() == [5.0, 5.0, 5.0, 15.0]
    assert derivative.tolist() == [0.0, 0.0, 0.0, 7.0]
    assert jac_sq.item() == 49.0
    dz, dcoeffs = torch.autograd.grad(jac_sq, (z, coeffs))
    assert dz.tolist() == [0.0, 0.0, 0.0, 2 * 7.0 * 2.0, 0.0]
    assert dcoeffs.tolist() == [0.0, 2 * 7.0, 2 * 7.0 * 2 * 2.0]
    y = ck.polynomial(z, coeffs, rectified=True)
    dz, dcoeffs = torch.autograd.grad(y[:4].sum(), (z, coeffs), retain_graph=True)
    assert dcoeffs[0].item() == 4.0
    assert y[4].isnan()
    assert torch.autograd.grad(y[4], z)[0][4].isnan()


@each(FULLEST)
def test_every_layout(case: Case, target: tuple[str, str]) -> None:
    for layout in case.layouts:
        for dtype in (torch.float32, torch.bfloat16):
            (judged,) = measure(case, layout, dtype, torch.float32, ["auto"], target[0]).values()
            assert [accuracy for accuracy in judged if not accuracy.passed] == [], layout.name


@each(FULLEST)
def test_every_derivative(case: Case, device: str) -> None:
    tensors = case.arguments((2, 3), torch.float64, device=device, requires_grad=True)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return case(dict(zip(tensors, values, strict=True)))

    inputs = tuple(tensors.values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


def test_opcheck(device: str) -> None:
    operators = torch.ops.chainzrule_kernels
    z, coeffs = (torch.randn(*shape, **FLOAT64, device=device) for shape in ((2, 3, 4), (4,)))
    weights, maps = torch.rand(4, **FLOAT64, device=device), torch.rand(3, 4, **FLOAT64, device=device)
    for operator, arguments in (
        (operators.polynomial, (z, coeffs, True)),
        (operators.polynomial_dreg, (z, weights, coeffs, True, True)),
        (operators.polynomial_dreg_backward, (z, weights, coeffs, z, z[..., 0], z, True, True, True, True)),
        (operators.polynomial_spatial_dreg, (z, maps, coeffs, True)),
        (operators.polynomial_spatial_dreg_backward, (z, maps, coeffs, z, z[:, 0, 0], True, True, True, True)),
        (operators.polynomial_tangent, (z, z[None], coeffs, True)),
        (operators.polynomial_tangent_backward, (z, z[None], coeffs, z, z[None], None, True, True, True, True)),
    ):
        leaves = [value.clone().requires_grad_() if isinstance(value, Tensor) else value for value in arguments]
        torch.library.opcheck(operator.default, leaves)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_transforms(transform: Callable[..., Callable[..., Tensor]], device: str) -> None:
    z = torch.randn(4, 3, **FLOAT64, device=device)
    coeffs = torch.randn(4, **FLOAT64, device=device)

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda row, coeffs: function(row, coeffs).square().sum()

    found = torch.vmap(
        transform(loss(lambda row, coeffs: ck.polynomial(row, coeffs, rectified=True)), (0, 1)), in_dims=(0, None)
    )(z, coeffs)
    expected = torch.vmap(
        transform(loss(lambda row, coeffs: ck.reference.polynomial(torch.relu(row), coeffs)), (0, 1)), in_dims=(0, None)
    )(z, coeffs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", [case.op for case in FULLEST])
def test_rectified_is_a_flag(op: str) -> None:
    (case,) = (case for case in FULLEST if case.op == op)
    arguments = {**case.arguments((2, 3)), **case.constants, "rectified": 1}
    for call in (PUBLIC_OPS[op].function, lambda **given: ck.explain(op, **given)):
        with pytest.raises(TypeError, match=r"^rectified: expected True or False, got int$"):
            call(**arguments)

"""Edges at which a kernel once went wrong: nothing arrives, everything is infinite, the same value a thousand times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import chainzrule_kernels as ck

operators = torch.ops.chainzrule_kernels
infinity = float("inf")


@pytest.mark.parametrize("output", [0, 1, 2])
@pytest.mark.parametrize("function", ["polynomial", "activation"])
def test_backward_without_tangents(function: str, output: int) -> None:
    """With T = 0 nothing arrives at the tangents, whichever output is used."""
    z = torch.randn(4, 17, requires_grad=True)
    z_dot = torch.zeros(0, 4, 17, requires_grad=True)
    if function == "polynomial":
        results = ck.polynomial_tangent(z, z_dot, torch.tensor([1.0, 2.0, 3.0]))
        slope = 2 + 6 * z.detach()
    else:
        results = ck.activation_tangent(z, z_dot, "sigmoid")
        slope = results[0].detach() * (1 - results[0].detach())
    results[output].sum().backward()
    torch.testing.assert_close(z.grad, slope if output == 0 else torch.zeros_like(z))
    assert z_dot.grad is not None
    assert z_dot.grad.shape == (0, 4, 17)


@pytest.mark.parametrize("wanted", [True, False])
def test_backward_operators_when_no_gradient_arrives(wanted: bool) -> None:
    z, z_dot, coeffs = torch.randn(4, 17), torch.randn(2, 4, 17), torch.randn(4)
    nothing = (None, None, None)
    found = [
        operators.polynomial_dreg_backward(z, torch.rand(17), coeffs, *nothing, False, wanted, wanted, wanted),
        operators.activation_dreg_backward(z, torch.rand(17), *nothing, "mish", wanted, wanted),
        operators.polynomial_tangent_backward(z, z_dot, coeffs, *nothing, False, wanted, wanted, wanted),
        operators.activation_tangent_backward(z, z_dot, *nothing, "mish", wanted, wanted),
    ]
    for results in found:
        for result in results:
            assert (result.numel() > 0) == wanted
            assert not result.any()


@pytest.mark.skipif(ck._native.cpu is None, reason="without the compiled module the definition serves the operator")
def test_backward_operator_refuses_the_gradient_of_an_absent_row_sq() -> None:
    z, coeffs = torch.randn(4, 17), torch.randn(4)
    with pytest.raises(RuntimeError, match="row_sq"):
        operators.polynomial_dreg_backward(z, None, coeffs, z, None, None, False, True, True, True)


@pytest.mark.parametrize(
    "z", [torch.ones(1, 20_000).index_fill(1, torch.tensor(3), infinity), torch.full((1000, 50), 1e25)]
)
def test_infinite_coefficient_gradients_stay_infinite(z: Tensor) -> None:
    coeffs = torch.ones(3, requires_grad=True)
    actual = torch.autograd.grad(ck.polynomial(z, coeffs).sum(), coeffs)[0]
    expected = torch.autograd.grad(ck.reference.polynomial(z, coeffs).sum(), coeffs)[0]
    torch.testing.assert_close(actual, expected)
    assert actual.isinf().any()


@pytest.mark.parametrize("shape", [(4, 2000), (1, 2000), (1000, 50), (256, 1024)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_sums_over_equal_values_do_not_drift(shape: tuple[int, int], per_channel: bool) -> None:
    """Rounding errors of equal terms have one sign and add up along a chain of additions."""
    z = torch.full(shape, 1.7)
    values = torch.tensor([0.0, 1.0, 0.1, 0.2])
    values = values[:, None].repeat(1, shape[1]) if per_channel else values

    def jac_sq_and_gradient(module: object, dtype: torch.dtype) -> list[Tensor]:
        coeffs = values.to(dtype).requires_grad_()
        y, jac_sq = module.polynomial_dreg(z.to(dtype), coeffs)  # type: ignore[attr-defined]
        return [jac_sq.detach().double(), torch.autograd.grad(y.sum() + jac_sq.sum(), coeffs)[0].double()]

    exact = jac_sq_and_gradient(ck.reference, torch.float64)
    plain = jac_sq_and_gradient(ck.reference, torch.float32)
    actual = jac_sq_and_gradient(ck, torch.float32)
    for one, by_pytorch, right in zip(actual, plain, exact, strict=True):
        ulp = torch.finfo(torch.float32).eps * right.abs().max()
        assert (one - right).abs().max() <= 2 * (by_pytorch - right).abs().max() + ulp


@pytest.mark.parametrize(
    "interval", [(-8.0, -4.0), (-6.0, -5.5), (-3.5, -3.0), (-0.6, -0.1), (0.1, 0.6), (1.0, 2.0), (4.0, 6.0)]
)
@pytest.mark.parametrize("kind", ck.ACTIVATION_KINDS)
def test_activations_are_accurate_in_every_interval(kind: str, interval: tuple[float, float]) -> None:
    """Draws from a wide range hide a loss in a narrow one."""
    z = torch.linspace(*interval, 4096)[:, None]

    def results_and_gradient(module: object, dtype: torch.dtype) -> list[Tensor]:
        leaf = z.to(dtype).requires_grad_()
        results = module.activation_dreg(leaf, kind, return_derivative=True)  # type: ignore[attr-defined]
        gradient = torch.autograd.grad(results[1].sum(), leaf)
        return [value.detach().double() for value in (*results, *gradient)]

    exact = results_and_gradient(ck.reference, torch.float64)
    plain = results_and_gradient(ck.reference, torch.float32)
    actual = results_and_gradient(ck, torch.float32)
    for one, by_pytorch, right in zip(actual, plain, exact, strict=True):
        ulp = torch.finfo(torch.float32).eps * right.abs().max()
        assert (one - right).abs().max() <= 2 * (by_pytorch - right).abs().max() + ulp


@pytest.mark.parametrize("shape", [(2048, 64), (3, 70_000), (70_000, 1)])
def test_double_backward_does_not_depend_on_the_number_of_threads(shape: tuple[int, int]) -> None:
    z = torch.randn(shape, requires_grad=True)
    coeffs = torch.randn(4, requires_grad=True)
    row_sq = torch.rand(shape[1], requires_grad=True)

    def second_gradients() -> tuple[Tensor, ...]:
        y, jac_sq = ck.polynomial_dreg(z, coeffs, row_sq)
        (slope,) = torch.autograd.grad(y.square().mean() + jac_sq.mean(), z, create_graph=True)
        return torch.autograd.grad(slope, (coeffs, row_sq), torch.ones_like(slope))

    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(second_gradients())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_transforms_inside_a_compiled_function() -> None:
    z, coeffs = torch.randn(3, 5), torch.randn(4)

    def slopes(z: Tensor, coeffs: Tensor) -> Tensor:
        return torch.func.grad(lambda inner: ck.polynomial(inner, coeffs).sum())(z)

    torch._dynamo.reset()
    compiled = torch.compile(slopes, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, coeffs), slopes(z, coeffs))


def test_vectorised_forward_mode_hessian() -> None:
    z, coeffs = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)

    def hessian(module: object) -> Tensor:
        return torch.autograd.functional.hessian(  # type: ignore[no-any-return]
            lambda z: module.polynomial_dreg(z, coeffs)[1].sum(),  # type: ignore[attr-defined]
            z,
            vectorize=True,
            outer_jacobian_strategy="forward-mode",
        )

    torch.testing.assert_close(hessian(ck), hessian(ck.reference))


def test_grad_fn_bears_the_name_of_the_operator() -> None:
    y = ck.polynomial(torch.randn(2, 3, requires_grad=True), torch.ones(4))
    assert y.grad_fn is not None
    assert "polynomial" in y.grad_fn.name()


@pytest.mark.parametrize("flag", ["yes", 1, torch.tensor(True)])
def test_return_derivative_must_be_a_bool(flag: object) -> None:
    with pytest.raises(TypeError, match="return_derivative: expected True or False"):
        ck.polynomial_dreg(torch.ones(2, 3), torch.ones(4), return_derivative=flag)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="return_derivative: expected True or False"):
        ck.activation_dreg(torch.ones(2, 3), "relu", return_derivative=flag)  # type: ignore[call-overload]

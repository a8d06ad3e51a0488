"""The other regularisers, against whole Jacobians in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chainzrule_kernels.regularisers import (
    input_gradient_penalty,
    jacobian_nuclear_penalty,
    projected_jacobian_penalty,
)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).double()


def inputs(requires_grad: bool = True) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(7, 6, dtype=torch.float64, generator=numbers).requires_grad_(requires_grad)


def jacobians(function, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.func.jacrev(function)(sample) for sample in x])


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True))


def assert_same_value_and_gradients(actual, expected, model):
    torch.testing.assert_close(actual, expected)
    for one, other in zip(gradients(actual, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(one, other)


def test_input_gradient_penalty_is_that_of_each_sample_alone(model):
    x, target = inputs(), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    penalty = input_gradient_penalty(F.cross_entropy(model(x), target, reduction="none"), x)
    expected = torch.stack(
        [
            torch.func.jacrev(lambda sample, label=label: F.cross_entropy(model(sample), label))(sample).square().sum()
            for sample, label in zip(x.detach(), target, strict=True)
        ]
    ).mean()
    assert penalty.shape == ()
    assert_same_value_and_gradients(penalty, expected, model)


def test_projected_jacobian_penalty_without_projections_is_the_norm(model):
    x = inputs()
    expected = jacobians(model, x.detach()).square().sum((1, 2)).mean()
    assert_same_value_and_gradients(projected_jacobian_penalty(model(x), x, None), expected, model)


def test_projected_jacobian_penalty_takes_outputs_and_inputs_of_any_shape(model):
    x = inputs().detach().view(7, 2, 3).requires_grad_()
    expected = (
        jacobians(lambda sample: model(sample.flatten()).view(2, 2), x.detach()).square().sum((1, 2, 3, 4)).mean()
    )
    outputs = model(x.flatten(1)).view(7, 2, 2)
    assert_same_value_and_gradients(projected_jacobian_penalty(outputs, x, None), expected, model)


def test_projected_jacobian_penalty_is_that_of_its_directions(model):
    x = inputs()
    penalty = projected_jacobian_penalty(model(x), x, 3, torch.Generator().manual_seed(5))
    directions = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    directions = directions / directions.norm(dim=-1, keepdim=True)
    projected = torch.einsum("pbc,bci->pbi", directions, jacobians(model, x.detach()))
    assert_same_value_and_gradients(penalty, 4 * projected.square().sum(-1).mean(), model)


def test_projected_jacobian_penalty_is_unbiased(model):
    x = inputs()
    exact = projected_jacobian_penalty(model(x), x, None).item()
    numbers = torch.Generator().manual_seed(0)
    draws = torch.stack([projected_jacobian_penalty(model(x), x, 1, numbers).detach() for _ in range(400)])
    standard_error = draws.std().item() / len(draws) ** 0.5
    assert abs(draws.mean().item() - exact) < 4 * standard_error
    assert standard_error < 0.05 * exact


def nuclear_norm(function, x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(jacobians(function, x)).sum(-1).mean()


def test_jacobian_nuclear_penalty_is_half_the_squared_norms_of_both_parts(model):
    inner, outer = model[:2], model[2:]
    x = inputs(requires_grad=False)
    hidden = inner(x).detach()
    expected = 0.5 * (
        jacobians(inner, x).square().sum((1, 2)).mean() + jacobians(outer, hidden).square().sum((1, 2)).mean()
    )
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([jacobian_nuclear_penalty(inner, outer, x, 1e-4, numbers) for _ in range(400)])
    standard_error = draws.std().item() / len(draws) ** 0.5
    assert abs(draws.mean().item() - expected.item()) < 4 * standard_error
    assert standard_error < 0.05 * expected.item()
    assert expected >= nuclear_norm(model, x)


def test_jacobian_nuclear_penalty_reaches_the_nuclear_norm_in_a_balanced_factorisation():
    numbers = torch.Generator().manual_seed(3)
    matrix = torch.randn(4, 6, dtype=torch.float64, generator=numbers)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = lambda x: x @ (values.sqrt()[:, None] * right).T  # noqa: E731
    outer = lambda h: h @ (left * values.sqrt()).T  # noqa: E731
    x = inputs(requires_grad=False)
    torch.testing.assert_close(outer(inner(x)), x @ matrix.T)
    draws = torch.stack([jacobian_nuclear_penalty(inner, outer, x, 1.0, numbers) for _ in range(400)])
    standard_error = draws.std().item() / len(draws) ** 0.5
    assert abs(draws.mean().item() - values.sum().item()) < 4 * standard_error
    assert standard_error < 0.05 * values.sum().item()


def test_jacobian_nuclear_penalty_can_be_trained(model):
    x = inputs(requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = nuclear_norm(model, x).item()
    numbers = torch.Generator().manual_seed(0)
    for _ in range(20):
        optimizer.zero_grad()
        jacobian_nuclear_penalty(model[:2], model[2:], x, generator=numbers).backward()
        optimizer.step()
    assert nuclear_norm(model, x).item() < 0.5 * before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: input_gradient_penalty(x.sum(1), x.detach()), ValueError, "inputs: expected a tensor that requires"),
        (lambda x: input_gradient_penalty(x.sum(), x), ValueError, r"losses: expected shape \(B,\).*got \(\)"),
        (lambda x: input_gradient_penalty(1.0, x), TypeError, "losses: expected a torch.Tensor, got float"),
        (lambda x: projected_jacobian_penalty(x.sum(1), x), ValueError, r"outputs: expected shape \(B, …\)"),
        (lambda x: projected_jacobian_penalty(x, x, 0), ValueError, "projections: expected at least 1, got 0"),
        (lambda x: projected_jacobian_penalty(x, x, 1.5), TypeError, "projections: expected an int or None, got float"),
        (lambda x: projected_jacobian_penalty(x, [1]), TypeError, "inputs: expected a torch.Tensor, got list"),
        (lambda x: jacobian_nuclear_penalty(abs, abs, x, 0.0), ValueError, "noise: expected a positive finite number"),
        (lambda x: jacobian_nuclear_penalty(abs, abs, x, "1"), TypeError, "noise: expected a number, got str"),
        (lambda x: jacobian_nuclear_penalty(abs, abs, 1), TypeError, "inputs: expected a torch.Tensor, got int"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(inputs())

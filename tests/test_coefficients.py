"""The builders of coefficients against the formulas they stand for, evaluated directly."""

from __future__ import annotations

import math

import pytest
import torch

import chainzrule_kernels as ck
from chainzrule_kernels import coefficients

POINTS = torch.linspace(-2, 2, 9, dtype=torch.float64)


def evaluate(coeffs: torch.Tensor, points: torch.Tensor = POINTS) -> torch.Tensor:
    """``Σ c_k x^k`` by powers; ``(points,)`` or ``(points, N)``."""
    powers = torch.stack([points**k for k in range(coeffs.shape[0])], 1)
    return powers @ coeffs


def hermite_polynomial(order: int, x: torch.Tensor) -> torch.Tensor:
    """The probabilists' ``He_order``, written out."""
    return [
        torch.ones_like(x),
        x,
        x**2 - 1,
        x**3 - 3 * x,
        x**4 - 6 * x**2 + 3,
        x**5 - 10 * x**3 + 15 * x,
        x**6 - 15 * x**4 + 45 * x**2 - 15,
        x**7 - 21 * x**5 + 105 * x**3 - 105 * x,
        x**8 - 28 * x**6 + 210 * x**4 - 420 * x**2 + 105,
    ][order]


@pytest.mark.parametrize("degree", range(1, 9))
def test_pkn_is_the_shifted_power(degree):
    a, c, offset = (torch.tensor(value, dtype=torch.float64) for value in (0.7, -1.3, 0.2))
    coeffs = coefficients.pkn(a, c, degree, offset)
    torch.testing.assert_close(evaluate(coeffs), a * (POINTS + c) ** degree + offset)


def test_pkn_at_no_shift_is_the_power_and_has_a_finite_gradient():
    c = torch.zeros((), dtype=torch.float64, requires_grad=True)
    coeffs = coefficients.pkn(1.0, c, 3)
    assert coeffs.tolist() == [0.0, 0.0, 0.0, 1.0]
    (gradient,) = torch.autograd.grad(evaluate(coeffs).sum(), c)
    torch.testing.assert_close(gradient, (3 * POINTS**2).sum())


def test_pkn_per_channel_and_mixed_with_numbers():
    a = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    coeffs = coefficients.pkn(a, 0.47, 2)
    assert coeffs.shape == (3, 3)
    assert coeffs.dtype == torch.float64
    torch.testing.assert_close(evaluate(coeffs), a * (POINTS[:, None] + 0.47) ** 2)


def test_react_is_the_quadratic():
    a, b, c = 0.009, torch.tensor(0.5, dtype=torch.float64), 0.47
    torch.testing.assert_close(evaluate(coefficients.react(a, b, c)), a * POINTS**2 + b * POINTS + c)


@pytest.mark.parametrize("degree", range(1, 9))
def test_react_of_another_degree(degree):
    a, b, c = 0.009, torch.tensor(0.5, dtype=torch.float64), 0.47
    torch.testing.assert_close(evaluate(coefficients.react(a, b, c, degree)), a * POINTS**degree + b * POINTS + c)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_polyrelu_puts_the_bias_in_front(channels):
    weight, bias = torch.randn(4, *channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    powers = torch.stack([POINTS**k for k in range(1, 5)], 1)
    torch.testing.assert_close(evaluate(coefficients.polyrelu(weight, bias)), powers @ weight + bias)
    shared = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(evaluate(coefficients.polyrelu(weight, shared)), powers @ weight + 0.3)


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("degree", range(1, 9))
def test_hermite_is_the_weighted_sum(degree, channels):
    shape = (degree + 1,) if channels is None else (degree + 1, channels)
    a = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(degree))
    terms = [hermite_polynomial(k, POINTS) / math.factorial(k) for k in range(degree + 1)]
    torch.testing.assert_close(evaluate(coefficients.hermite(a)), torch.stack(terms, 1) @ a)


def test_hermite_start_has_the_authors_values():
    start = coefficients.hermite_start(3, dtype=torch.float64)
    expected = [math.sqrt(1 - 1 / 6) / math.sqrt(math.e)] + [1 / math.sqrt(math.e)] * 3
    assert start.tolist() == pytest.approx(expected, rel=1e-15)
    assert torch.equal(coefficients.hermite_start(3, 2, dtype=torch.float64), start[:, None].expand(4, 2))


def test_identity_and_monomial():
    assert coefficients.identity().tolist() == [0.0, 1.0, 0.0, 0.0]
    assert coefficients.monomial(0, 2).tolist() == [1.0, 0.0, 0.0]
    assert coefficients.monomial(4).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert torch.equal(coefficients.identity(2, 3), torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 3))


def test_least_squares_relu_is_the_least_squares_quadratic():
    points = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    design = torch.stack([points**2, points, torch.ones_like(points)], 1)
    solution = torch.linalg.lstsq(design, points.relu()[:, None]).solution.flatten()
    assert coefficients.least_squares_relu(5.0) == pytest.approx(solution.tolist(), abs=1e-4)


def test_builders_are_differentiable_in_every_parameter():
    def parameters(*shape):
        return torch.rand(shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(
        lambda a, c, offset: coefficients.pkn(a, c, 4, offset), (parameters(3), parameters(), parameters(3))
    )
    assert torch.autograd.gradcheck(coefficients.react, (parameters(), parameters(2), parameters(2)))
    assert torch.autograd.gradcheck(coefficients.hermite, (parameters(5, 2),))


def test_builders_compile_and_reach_the_engine():
    c = torch.tensor(0.3, requires_grad=True)
    z = torch.randn(5, 4)

    def value(c, z):
        return ck.polynomial(z, coefficients.pkn(0.009, c, 2)).sum()

    (eager,) = torch.autograd.grad(value(c, z), c)
    (compiled,) = torch.autograd.grad(torch.compile(value, fullgraph=True, backend="aot_eager")(c, z), c)
    torch.testing.assert_close(eager, (2 * 0.009 * (z + c.detach())).sum())
    torch.testing.assert_close(compiled, eager)


def test_dtype_follows_the_tensors():
    assert coefficients.react(1, 2, 3).dtype == torch.get_default_dtype()
    half = torch.tensor(0.5, dtype=torch.bfloat16)
    assert coefficients.react(half, 2.0, 3.0).dtype == torch.bfloat16
    assert coefficients.react(half, torch.tensor(2.0), 3.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: coefficients.pkn(1.0, 1.0, 0), ValueError, "degree: expected 1 to 8, got 0"),
        (lambda: coefficients.pkn(1.0, 1.0, 9), ValueError, "degree: expected 1 to 8, got 9"),
        (lambda: coefficients.pkn(1.0, 1.0, 2.0), TypeError, "degree: expected an int between 1 and 8, got float"),
        (lambda: coefficients.pkn("1", 1.0, 2), TypeError, "a: expected a number or a torch.Tensor, got str"),
        (lambda: coefficients.pkn(1.0, torch.ones(2, dtype=torch.int64), 2), TypeError, "c: expected a floating-point"),
        (
            lambda: coefficients.react(torch.ones(2, 2), 1.0, 1.0),
            ValueError,
            r"a: expected a 0-d tensor or shape \(N,\)",
        ),
        (lambda: coefficients.react(torch.ones(2), torch.ones(3), 1.0), ValueError, "a, b, c: expected one number of"),
        (
            lambda: coefficients.react(torch.ones(2), torch.ones(2, device="meta"), 1.0),
            ValueError,
            "b: expected device cpu",
        ),
        (lambda: coefficients.hermite([1.0, 2.0]), TypeError, "a: expected a floating-point torch.Tensor, got list"),
        (lambda: coefficients.hermite(torch.ones(10)), ValueError, "a: expected shape"),
        (lambda: coefficients.react(1.0, 1.0, 1.0, 9), ValueError, "degree: expected 1 to 8, got 9"),
        (lambda: coefficients.polyrelu(torch.ones(9), torch.ones(())), ValueError, r"weight: expected shape \(D,\)"),
        (lambda: coefficients.polyrelu(torch.ones(3), torch.ones(3)), ValueError, "bias: expected a 0-d tensor"),
        (lambda: coefficients.polyrelu(torch.ones(3), 0.0), TypeError, "bias: expected a floating-point torch.Tensor"),
        (lambda: coefficients.hermite_start(0), ValueError, "degree: expected 1 to 8, got 0"),
        (lambda: coefficients.monomial(3, 2), ValueError, "power: expected 0 to 2, the degree, got 3"),
        (lambda: coefficients.monomial(1.0, 2), TypeError, "power: expected an int, got float"),
        (lambda: coefficients.identity(3, -1), ValueError, "num_channels: expected at least 0, got -1"),
        (lambda: coefficients.least_squares_relu(0.0), ValueError, "half_width: expected a positive, finite number"),
        (lambda: coefficients.least_squares_relu(math.inf), ValueError, "half_width: expected .* finite .*, got inf"),
        (lambda: coefficients.least_squares_relu("5"), TypeError, "half_width: expected a number, got str"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

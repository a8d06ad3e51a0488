"""The layers: what they compute, how they start, and that PyTorch's machinery takes them as it takes its own."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import chainzrule_kernels as ck


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No compiled code of another test, which would count as a recompilation."""
    torch._dynamo.reset()


def horner(coeffs: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return sum(coefficient * z**power for power, coefficient in enumerate(coeffs))


@pytest.mark.parametrize("num_channels", [None, 4])
@pytest.mark.parametrize("degree", [1, 3, 8])
def test_polynomial_is_the_polynomial_of_its_coefficients(num_channels, degree):
    layer = ck.nn.Polynomial(num_channels, degree, noise=0.3, dtype=torch.float64)
    z = torch.randn(2, 5, 4, dtype=torch.float64)
    assert layer.coeffs.shape == ((degree + 1,) if num_channels is None else (degree + 1, num_channels))
    torch.testing.assert_close(layer(z), horner(layer.coeffs, z))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_polynomial_linear_is_a_polynomial_behind_a_linear_map(per_channel, bias):
    layer = ck.nn.PolynomialLinear(3, 4, bias, 2, per_channel=per_channel, noise=0.3, dtype=torch.float64)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), horner(layer.coeffs, F.linear(x, layer.weight, layer.bias)))
    assert (layer.bias is None) is not bias


def test_chainzrule_net_is_its_layers_in_order():
    net = ck.nn.ChainzRuleNet((3, 5, 4, 2), degree=2, per_channel=True)
    assert [type(layer) for layer in net] == [ck.nn.PolynomialLinear, ck.nn.PolynomialLinear, nn.Linear]
    assert all(layer.per_channel and layer.degree == 2 for layer in net[:2])
    assert isinstance(net[1:], nn.Sequential)
    assert list(net[1:].state_dict()) == list(net.state_dict())[3:]
    x = torch.randn(6, 3)
    assert torch.equal(net(x), net[2](net[1](net[0](x))))
    assert isinstance(ck.nn.ChainzRuleNet((3, 5, 2), final_polynomial=True)[1], ck.nn.PolynomialLinear)
    assert all(layer.bias is None for layer in ck.nn.ChainzRuleNet((3, 5, 2), bias=False))


def test_layers_start_at_the_identity_with_noise():
    exact = ck.nn.PolynomialLinear(3, 4, noise=0.0)
    assert exact.coeffs.tolist() == [0.0, 1.0, 0.0, 0.0]
    torch.manual_seed(0)
    noisy = ck.nn.Polynomial(10_000, noise=0.05)
    deviation = noisy.coeffs.detach() - ck.coefficients.identity(3, 10_000)
    assert deviation.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(deviation.mean().item()) < 0.001


def test_weights_start_as_those_of_linear_and_reset_starts_again():
    torch.manual_seed(0)
    linear = nn.Linear(7, 4)
    torch.manual_seed(0)
    layer = ck.nn.PolynomialLinear(7, 4)
    torch.testing.assert_close(layer.weight, linear.weight)
    torch.testing.assert_close(layer.bias, linear.bias)
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(9.0)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_state_dict_copy_and_pickle_keep_the_function():
    net = ck.nn.ChainzRuleNet((3, 5, 2), noise=0.2)
    x = torch.randn(4, 3)
    assert list(net.state_dict()) == ["0.weight", "0.bias", "0.coeffs", "1.weight", "1.bias"]
    other = ck.nn.ChainzRuleNet((3, 5, 2))
    other.load_state_dict(net.state_dict())
    for twin in (other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))


def test_extra_repr_shows_the_arguments():
    assert repr(ck.nn.Polynomial(5, 2)) == "Polynomial(num_channels=5, degree=2)"
    assert repr(ck.nn.PolynomialLinear(3, 4, bias=False)) == (
        "PolynomialLinear(in_features=3, out_features=4, bias=False, degree=3, per_channel=False)"
    )


def test_meta_device_then_to_empty():
    net = ck.nn.ChainzRuleNet((3, 5, 2), device="meta", dtype=torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in net.parameters())
    net.to_empty(device="cpu")
    for layer in net:
        layer.reset_parameters()
    assert net(torch.randn(4, 3, dtype=torch.bfloat16)).isfinite().all()


def test_training_moves_every_parameter_and_lowers_the_loss():
    torch.manual_seed(0)
    net = ck.nn.ChainzRuleNet((2, 16, 16, 1), per_channel=True)
    x = torch.rand(256, 2) * 2 - 1
    target = (x[:, :1] * x[:, 1:]).detach()  # a product: no linear net can fit it
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        loss = F.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01 * target.square().mean().item()
    assert not any(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_autocast_follows_linear():
    layer = ck.nn.PolynomialLinear(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("build", [lambda: ck.nn.ChainzRuleNet((3, 5, 5, 2), noise=0.1), lambda: ck.nn.Polynomial()])
def test_compile_without_breaks_or_recompiles(build):
    net = build()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(7, 3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (8, 11):
            x = torch.randn(batch, 3)
            torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ck.nn.Polynomial(degree=0), ValueError, "degree: expected 1 to 8, got 0"),
        (lambda: ck.nn.Polynomial(degree=9), ValueError, "degree: expected 1 to 8, got 9"),
        (lambda: ck.nn.Polynomial(2.0), TypeError, "num_channels: expected an int, got float"),
        (lambda: ck.nn.Polynomial(noise=-1.0), ValueError, "noise: expected a finite number of at least 0, got -1.0"),
        (
            lambda: ck.nn.Polynomial(noise=math.inf),
            ValueError,
            "noise: expected a finite number of at least 0, got inf",
        ),
        (lambda: ck.nn.PolynomialLinear(1, 2, noise=math.nan), ValueError, "noise: expected a finite number"),
        (lambda: ck.nn.Polynomial(noise="0"), TypeError, "noise: expected a number, got str"),
        (lambda: ck.nn.PolynomialLinear(-1, 2), ValueError, "in_features: expected at least 0, got -1"),
        (lambda: ck.nn.PolynomialLinear(1, "2"), TypeError, "out_features: expected an int, got str"),
        (lambda: ck.nn.PolynomialLinear(1, 2, degree=True), TypeError, "degree: expected an int"),
        (lambda: ck.nn.PolynomialLinear(1, 2, "x"), TypeError, "bias: expected True or False, got str"),
        (
            lambda: ck.nn.PolynomialLinear(1, 2, per_channel="x"),
            TypeError,
            "per_channel: expected True or False, got str",
        ),
        (lambda: ck.nn.ChainzRuleNet((3, 2), bias="x"), TypeError, "bias: expected True or False, got str"),
        (
            lambda: ck.nn.ChainzRuleNet((3, 2), final_polynomial=1),
            TypeError,
            "final_polynomial: expected True or False, got int",
        ),
        (lambda: ck.nn.ChainzRuleNet(5), TypeError, "sizes: expected a sequence of ints, got int"),
        (lambda: ck.nn.ChainzRuleNet((3,)), ValueError, "sizes: expected at least two"),
        (lambda: ck.nn.ChainzRuleNet((3, 2.5)), TypeError, r"sizes\[1\]: expected an int, got float"),
        (
            lambda: ck.nn.Polynomial(4)(torch.ones(2, 3)),
            ValueError,
            r"z: expected shape \(..., num_channels\) with num_channels = 4, got \(2, 3\)",
        ),
        (lambda: ck.nn.Polynomial(4)(torch.ones(())), ValueError, "z: expected shape .* got a 0-d tensor"),
        (lambda: ck.nn.Polynomial(4)([1.0]), TypeError, "z: expected a torch.Tensor, got list"),
        (lambda: ck.nn.Polynomial()(torch.ones(2, dtype=torch.int64)), TypeError, "z: expected dtype"),
        (
            lambda: ck.nn.PolynomialLinear(3, 4)(torch.ones(2, 5)),
            ValueError,
            r"x: expected shape \(..., in_features\) with in_features = 3, got \(2, 5\)",
        ),
        (lambda: ck.nn.PolynomialLinear(3, 4)([1.0]), TypeError, "x: expected a torch.Tensor, got list"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

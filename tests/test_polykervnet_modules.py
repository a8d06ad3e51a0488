"""The published polynomials as modules: what they compute, how they start, and that PyTorch's machinery takes them."""

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


# Each module, by a name, as a function of its dtype, and what it computes of x, written out.
ACTIVATIONS = {
    "act": (lambda **kw: ck.nn.ActPKN(**kw), lambda x: (x + 1.0) ** 2),
    "act cubed": (lambda **kw: ck.nn.ActPKN(3, c=0.3, **kw), lambda x: (x + 0.3) ** 3),
    "react": (lambda **kw: ck.nn.ReactPKN(**kw), lambda x: 0.009 * x**2 + 0.5 * x + 0.47),
    "react quartic": (lambda **kw: ck.nn.ReactPKN(4, **kw), lambda x: 0.009 * x**4 + 0.5 * x + 0.47),
    "hermite": (
        lambda **kw: ck.nn.Hermite(**kw),
        lambda x: math.exp(-0.5) * (math.sqrt(1 - 1 / 6) + x + (x**2 - 1) / 2 + (x**3 - 3 * x) / 6),
    ),
    "polyrelu": (
        lambda **kw: ck.nn.PolyReLU(**kw),
        lambda x: (F.relu(x) + F.relu(x) ** 2 + F.relu(x) ** 3) / 3,
    ),
}
CONVOLUTIONS = {
    "polynomial": (lambda *a, **kw: ck.nn.PolynomialConv2d(*a, noise=0.0, **kw), lambda s, bias: s + bias),
    "pkn": (lambda *a, **kw: ck.nn.PKNConv2d(*a, bias=True, **kw), lambda s, bias: (s + bias + 1.0) ** 2),
    "rpkn": (lambda *a, **kw: ck.nn.RPKNConv2d(*a, bias=True, **kw), lambda s, bias: 0.009 * (s + bias + 0.47) ** 2),
    "kerv": (lambda *a, **kw: ck.nn.KervConv2d(*a, **kw), lambda s, bias: (s + 1.0) ** 3 + bias),
}
GEOMETRIES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "same and dilated": {"padding": "same", "dilation": (1, 2)},
    "grouped": {"groups": 2, "padding": (0, 1)},
    "reflecting": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": "same", "padding_mode": "circular"},
}
FLOAT64 = {"dtype": torch.float64}


def modules(dtype: torch.dtype = torch.float32) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Every module with an input that it takes."""
    image = torch.randn(2, 4, 6, 5, dtype=dtype)
    found = {name: (build(dtype=dtype), image) for name, (build, _) in ACTIVATIONS.items()}
    found |= {name: (build(4, 6, 3, dtype=dtype), image) for name, (build, _) in CONVOLUTIONS.items()}
    signal = torch.randn(2, 4, 9, dtype=dtype)
    found["one-dimensional"] = (ck.nn.PolynomialConv1d(4, 6, 3, padding="same", per_channel=True, dtype=dtype), signal)
    return found


every_module = pytest.mark.parametrize("name", list(modules()))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 4, 6, 5)])
def test_activation_is_its_formula(name, shape):
    build, formula = ACTIVATIONS[name]
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(build(**FLOAT64)(x), formula(x))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_is_its_formula_behind_that_of_torch(name, geometry):
    build, formula = CONVOLUTIONS[name]
    layer = build(4, 6, 3, **GEOMETRIES[geometry], **FLOAT64)
    plain = nn.Conv2d(4, 6, 3, bias=False, **GEOMETRIES[geometry], **FLOAT64)
    plain.weight = layer.weight
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), formula(plain(x), layer.bias[:, None, None]))


def test_one_dimensional_convolution_with_a_polynomial_for_each_channel():
    layer = ck.nn.PolynomialConv1d(4, 6, 3, 2, 1, degree=2, per_channel=True, noise=0.5, **FLOAT64)
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    s = F.conv1d(x, layer.weight, layer.bias, 2, 1)
    c0, c1, c2 = layer.coeffs[:, :, None]
    torch.testing.assert_close(layer(x), c0 + c1 * s + c2 * s**2)
    assert layer.coeffs.shape == (3, 6)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_published_starts():
    layer = ck.nn.RPKNConv2d(3, 4, 3)
    assert layer.bias is None
    torch.testing.assert_close(layer.a, torch.tensor(0.009))
    assert layer.c.item() == torch.tensor(0.47).item()
    assert math.isclose(ck.nn.RPKNConv2d(3, 4, 3, **FLOAT64).a.item(), 0.009, rel_tol=1e-15)
    assert ck.nn.PKNConv2d(3, 4, 3).bias is None
    kerv = ck.nn.KervConv2d(3, 4, 3)
    assert kerv.degree == 3
    assert not kerv.c.requires_grad
    assert ck.nn.KervConv2d(3, 4, 3, learnable=True).c.requires_grad
    react = ck.nn.ReactPKN(**FLOAT64)
    assert [react.a.item(), react.b.item(), react.c.item()] == [0.009, 0.5, 0.47]
    a, b, c = ck.coefficients.least_squares_relu()
    assert ck.nn.ReactPKN(a=a, b=b, c=c).coefficients().tolist() == [0.46875, 0.5, 0.09375]


def test_scale_of_rpkn_stays_positive_under_any_step():
    layer = ck.nn.RPKNConv2d(1, 1, 1)
    optimizer = torch.optim.SGD([layer.log_a], 1.0)
    for _ in range(5):
        (1e3 * layer.a + layer.a.log()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < layer.a.item() < 0.009


@every_module
def test_gradients(name):
    module, x = modules(torch.float64)[name]
    x = (x + 0.1 * x.sign() if name == "polyrelu" else x)[:1, :, :4].requires_grad_()  # away from the corner of relu
    parameters = dict(module.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (x, *parameters.values())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@every_module
def test_state_dict_copy_and_pickle_keep_the_function(name):
    module, x = modules()[name]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter) / 9)
    other, _ = modules()[name]
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


@every_module
def test_reset_starts_again(name):
    torch.manual_seed(0)
    module, _ = modules()[name]
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(9.0)
    module.reset_parameters()
    for key, value in module.state_dict().items():
        if key in ("weight", "bias") and isinstance(module, nn.modules.conv._ConvNd):
            assert (value.abs() < 1).all()
            assert value.std() > 0
        elif key == "coeffs":  # the identity with noise
            assert (value - before[key]).abs().max() < 0.1
        else:
            assert torch.equal(value, before[key])


def test_polyrelu_keeps_its_input_alone_for_the_backward():
    layer, x = ck.nn.PolyReLU(), torch.randn(64, 32, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: sizes.append(value.numel()) or value, lambda v: v):
        y = layer(x)
    assert [size for size in sizes if size >= x.numel()] == [x.numel()]
    y.sum().backward()
    assert torch.equal(x.grad != 0, x > 0)


@every_module
def test_keeps_channels_last_and_dtype(name):
    module, x = modules(torch.bfloat16)[name]
    if x.dim() == 4:
        y = module(x.to(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, module(x))
    assert module(x).dtype == torch.bfloat16


@every_module
def test_compile_without_breaks_or_recompiles(name):
    module, x = modules()[name]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(x.repeat(5, *[1] * (x.dim() - 1)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 7):
            other = x.repeat(batch, *[1] * (x.dim() - 1))
            torch.testing.assert_close(compiled(other), module(other))


def test_weights_start_as_those_of_torch():
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3)
    torch.manual_seed(0)
    layer = ck.nn.PolynomialConv2d(3, 4, 3)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


def test_extra_repr_shows_the_arguments():
    assert repr(ck.nn.RPKNConv2d(3, 4, 3, padding=1)) == (
        "RPKNConv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False, degree=2, a=0.009, c=0.47)"
    )
    assert repr(ck.nn.KervConv2d(3, 4, 3)) == (
        "KervConv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), degree=3, c=1, learnable=False)"
    )
    assert repr(ck.nn.PolynomialConv1d(3, 4, 3, per_channel=True)) == (
        "PolynomialConv1d(3, 4, kernel_size=(3,), stride=(1,), degree=3, per_channel=True)"
    )
    assert repr(ck.nn.ReactPKN()) == "ReactPKN(degree=2, a=0.009, b=0.5, c=0.47)"
    assert repr(ck.nn.ActPKN()) == "ActPKN(degree=2, c=1)"
    assert repr(ck.nn.Hermite()) == "Hermite(degree=3)"
    assert repr(ck.nn.PolyReLU(4)) == "PolyReLU(degree=4)"


def test_meta_device_then_to_empty():
    for build in (ck.nn.PolynomialConv2d, ck.nn.RPKNConv2d, ck.nn.KervConv2d):
        layer = build(3, 4, 3, device="meta", dtype=torch.bfloat16)
        assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
        layer.to_empty(device="cpu").reset_parameters()
        assert layer(torch.randn(2, 3, 5, 5, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("kernel", [ck.nn.PolynomialConv2d, ck.nn.PKNConv2d, ck.nn.RPKNConv2d, ck.nn.KervConv2d])
def test_from_conv_keeps_the_parameters_and_draws_no_weights(kernel):
    conv = nn.Conv2d(4, 6, 3, 2, "valid", 2, 2, dtype=torch.float64).eval()
    torch.manual_seed(0)
    layer = kernel.from_conv(conv, degree=4)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    assert layer.degree == 4
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "in_channels", "out_channels")
    assert all(getattr(layer, name) == getattr(conv, name) for name in names)
    assert all(value.device.type == "cpu" and value.dtype == torch.float64 for value in layer.parameters())
    direct = kernel(4, 6, 3, 2, "valid", 2, 2, True, degree=4, dtype=torch.float64)
    direct.weight, direct.bias = conv.weight, conv.bias
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    if kernel is not ck.nn.PolynomialConv2d:  # whose coefficients start with noise
        assert torch.equal(layer(x), direct(x))
        state = torch.get_rng_state()
        kernel.from_conv(conv)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("variant", ["layer", "activation"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("is_convolution", [False, True])
def test_dreg_penalises_the_jacobian_of_an_activation_behind_its_layer(name, is_convolution, variant):
    torch.manual_seed(0)
    linear = nn.Conv2d(2, 3, 3, padding=1, **FLOAT64) if is_convolution else nn.Linear(5, 3, **FLOAT64)
    activation = ACTIVATIONS[name][0](**FLOAT64)
    x = torch.randn((4, 2, 4, 3) if is_convolution else (4, 5), dtype=torch.float64)
    model = nn.Sequential(linear, activation)
    layer = model if variant == "layer" else activation
    inputs = x if variant == "layer" else linear(x).detach()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda sample: layer(sample[None])[0]))(inputs)
    expected = jacobian.flatten(1).square().sum(1).mean()
    y = model(x)
    reg = ck.DREG(model, 1.0, variant)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(reg.penalty(), expected.detach())
    assert reg.layers[0].module == type(activation).__name__
    gradients = torch.autograd.grad(reg.penalty(), list(activation.parameters()), materialize_grads=True)
    wanted = torch.autograd.grad(expected, list(activation.parameters()), materialize_grads=True)
    torch.testing.assert_close(gradients, wanted)
    assert all(0 < row.nonlinearity < 1 for row in reg.report(x))


@every_module
def test_dreg_takes_the_jacobian_of_each_module(name):
    module, x = modules(torch.float64)[name]
    if isinstance(module, nn.modules.conv._ConvNd):
        model = nn.Sequential(module)
    else:
        model = nn.Sequential(nn.Conv2d(4, 3, 2, **FLOAT64), module)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda sample: model(sample[None])[0]))(x)
    y = model(x)
    expected = jacobian.flatten(1).square().sum(1).mean()
    # With one layer it is that layer's own, exactly, in either variant.
    for arguments in ({"variant": "accumulated", "probes": "exact"}, {"variant": "layer"}):
        reg = ck.DREG(model, 1.0, **arguments)
        torch.testing.assert_close(model(x), y)
        torch.testing.assert_close(reg.penalty(), expected)
        spread = (jacobian - jacobian.mean(0)).square().sum() / jacobian.square().sum()
        if arguments["variant"] == "layer":
            assert reg.report(x)[0].nonlinearity == pytest.approx(spread.item(), abs=1e-6)
        reg.remove()


@pytest.mark.parametrize("variant", ["layer", "activation"])
def test_dreg_penalises_a_kernel_convolution(variant):
    torch.manual_seed(0)
    layer = ck.nn.RPKNConv2d(2, 3, 3, 2, 1, bias=True, a=0.5, **FLOAT64)
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    if variant == "layer":
        jacobian = torch.func.vmap(torch.func.jacrev(lambda sample: layer(sample[None])[0]))(x)
    else:
        s = F.conv2d(x, layer.weight, layer.bias, 2, 1)
        jacobian = 2 * layer.a * (s + layer.c)  # only its diagonal differs from 0
    expected = jacobian.flatten(1).square().sum(1).mean()
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    y = layer(x)
    model = nn.Sequential(layer)
    reg = ck.DREG(model, 1.0, variant)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(reg.penalty(), expected)
    torch.testing.assert_close(torch.autograd.grad(reg.penalty(), parameters), wanted)
    (row,) = reg.report(x)
    assert 0 < row.nonlinearity < 1
    assert row.mean == pytest.approx(jacobian.flatten(1).norm(dim=1).mean().item())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ck.nn.RPKNConv2d(1, 1, 1, a=0.0), ValueError, "a: expected a number above 0, got 0.0"),
        (lambda: ck.nn.RPKNConv2d(1, 1, 1, a="1"), TypeError, "a: expected a number, got str"),
        (lambda: ck.nn.RPKNConv2d(1, 1, 1, c=math.nan), ValueError, "c: expected a finite number, got nan"),
        (lambda: ck.nn.PKNConv2d(1, 1, 1, degree=9), ValueError, "degree: expected 1 to 8, got 9"),
        (lambda: ck.nn.PKNConv2d(1, 1, 1, learnable=1), TypeError, "learnable: expected True or False, got int"),
        (lambda: ck.nn.KervConv2d(1, 1, 1, bias=1), TypeError, "bias: expected True or False, got int"),
        (lambda: ck.nn.KervConv2d(3, 4, 1, groups=2), ValueError, "in_channels must be divisible by groups"),
        (lambda: ck.nn.PolynomialConv2d(1, 1, 1, per_channel=0), TypeError, "per_channel: expected True or False"),
        (lambda: ck.nn.PolynomialConv1d(1, 1, 1, noise=-1.0), ValueError, "noise: expected a finite number"),
        (lambda: ck.nn.ReactPKN(b="x"), TypeError, "b: expected a number, got str"),
        (lambda: ck.nn.ActPKN(0), ValueError, "degree: expected 1 to 8, got 0"),
        (lambda: ck.nn.Hermite(2.0), TypeError, "degree: expected an int"),
        (lambda: ck.nn.PolyReLU(9), ValueError, "degree: expected 1 to 8, got 9"),
        (lambda: ck.nn.ReactPKN()([1.0]), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda: ck.nn.PolyReLU()(torch.ones(2, dtype=torch.int64)), TypeError, "x: expected dtype"),
        (lambda: ck.nn.ActPKN()(torch.ones(())), ValueError, "x: expected shape .* got a 0-d tensor"),
        (lambda: ck.nn.RPKNConv2d(3, 1, 1)([1.0]), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda: ck.nn.RPKNConv2d(3, 1, 1)(torch.ones(1, 2, 4, 4)), ValueError, "weight|x"),
        (
            lambda: ck.nn.RPKNConv2d.from_conv(nn.Conv1d(1, 1, 1)),
            TypeError,
            "conv: expected a torch.nn.Conv2d, got Con",
        ),
        (lambda: ck.nn.RPKNConv2d.from_conv(nn.LazyConv2d(1, 1)), ValueError, "one that has not run yet"),
        (
            lambda: ck.nn.RPKNConv2d.from_conv(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1))),
            ValueError,
            "whose weight is computed from others",
        ),
        (lambda: ck.nn.PKNConv2d.from_conv(nn.Conv2d(1, 1, 1), a=1.0), TypeError, "unexpected keyword argument 'a'"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

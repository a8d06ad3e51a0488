"""DREG on models in plain PyTorch and of other libraries: what it finds, and the penalty against explicit Jacobians."""

from __future__ import annotations

import copy
import functools
import io
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import chainzrule_kernels as ck
from chainzrule_kernels.dreg import discover, interception
from tests import networks
from tests.networks import NETWORKS

STRENGTH = 0.7


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No compiled code of another test, which would count as a recompilation."""
    torch._dynamo.reset()


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A network of NETWORKS in float64, with batch norms that have seen something, and a batch for it."""
    build, inputs, _ = NETWORKS[name]
    torch.manual_seed(1)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model, inputs()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


class Probe:
    """The inputs of linear maps, the outputs of batch norms, noted by PyTorch's own hooks while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.handles = [
            module.register_forward_pre_hook(partial(self._note, name), with_kwargs=True)
            for name, module in model.named_modules()
        ]

    def _note(self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.inputs.setdefault(name, []).append(next(iter((*args, *kwargs.values())), None))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def jacobian_sq(layer, x: Tensor) -> Tensor:
    """``‖J‖_F²`` of ``layer`` at ``x``, differentiable."""
    return torch.func.jacrev(layer)(x).square().sum()


def layer_functions(name: str, model: nn.Module) -> list:
    """For each layer of a network, the function of one sample (or token) that its Jacobian belongs to."""
    if name == "perceptron":
        return [nn.Sequential(model[0], model[1]), nn.Sequential(model[3], model[5])]
    if name == "functional perceptron":
        return [
            lambda x: F.gelu(model.first(x), approximate="tanh"),
            lambda x: F.silu(model.second(x)),
            lambda x: torch.tanh(model.third(x)),
        ]
    if name == "residual net":
        pairs = [(model.stem[0], model.stem[1]), *((block.conv1, block.bn1) for block in (model.first, model.second))]
        return [lambda x, conv=conv, norm=norm: torch.relu(norm(conv(x[None])))[0] for conv, norm in pairs]
    activation = F.gelu if name == "vision transformer" else lambda z: F.gelu(z, approximate="tanh")
    return [lambda x, block=block: activation(block.fc1(x)) for block in model.blocks]


def expected_penalty(name: str, model: nn.Module, x: Tensor) -> Tensor:
    """The definition: Jacobians one by one, differentiable by double backward."""
    probe = Probe(model)
    model(x)
    probe.remove()
    total = torch.zeros((), dtype=torch.float64)
    for (_, linear), layer in zip(NETWORKS[name][2], layer_functions(name, model), strict=True):
        (inputs,) = probe.inputs[linear]
        samples = inputs if name == "residual net" else inputs.flatten(0, -2)
        total = total + torch.stack([jacobian_sq(layer, sample) for sample in samples]).mean()
    return STRENGTH * total


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_penalty_and_its_gradients_are_those_of_explicit_jacobians(name):
    model, x = built(name)
    model.eval()
    expected = expected_penalty(name, model, x)
    reg = ck.DREG(model, STRENGTH)
    assert [(row.name, row.penalises) for row in reg.layers] == [(layer, "layer") for layer, _ in NETWORKS[name][2]]
    model(x)
    penalty = reg.penalty()
    torch.testing.assert_close(penalty, expected)
    for found, wanted in zip(gradients(model, penalty), gradients(model, expected), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_task_gradients_stay_and_removal_leaves_no_trace(name):
    model, x = built(name)
    twin = copy.deepcopy(model)
    before = [dict(module.__dict__) for module in model.modules()]
    reg = ck.DREG(model, STRENGTH)
    hooks_seen = []
    handles = [module.register_forward_hook(lambda *_: hooks_seen.append(1)) for module in model.modules()]
    twin_hooks_seen = []
    twin_handles = [module.register_forward_hook(lambda *_: twin_hooks_seen.append(1)) for module in twin.modules()]
    torch.manual_seed(3)
    output = model(x)
    torch.manual_seed(3)
    expected = twin(x)
    assert len(hooks_seen) == len(twin_hooks_seen)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(
        gradients(model, output.square().sum()), gradients(twin, expected.square().sum()), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert list(model.state_dict()) == list(twin.state_dict())
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)  # batch norms have counted the same batch
    for handle in (*handles, *twin_handles):
        handle.remove()
    reg.remove()
    for module, attributes in zip(model.modules(), before, strict=True):
        assert set(module.__dict__) == set(attributes)
        assert all(len(value) == 0 for key, value in module.__dict__.items() if "hooks" in key and value is not None)
        assert all(module.__dict__[key] is value for key, value in attributes.items())


def test_batch_norm_in_training_folds_with_the_sigma_of_the_batch():
    torch.manual_seed(1)
    conv, norm = nn.Conv2d(2, 3, 3, padding=1).double(), nn.BatchNorm2d(3).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    model = nn.Sequential(conv, norm, nn.GELU())
    reg = ck.DREG(model, STRENGTH)
    x = networks.images(5)
    running = norm.running_var.clone()
    model(x)
    penalty = reg.penalty()
    assert not torch.equal(norm.running_var, running)
    s = conv(x)
    mean, variance = s.mean((0, 2, 3)), s.var((0, 2, 3), correction=0).detach()

    def layer(sample):
        normed = (conv(sample[None])[0] - mean[:, None, None]) * (norm.weight / (variance + norm.eps).sqrt())[
            :, None, None
        ]
        return F.gelu(normed + norm.bias[:, None, None])

    # The mean stays attached in z, as it is in the model; it is a constant of each sample's Jacobian. The variance in z
    # is attached in the model, so the gradients are compared for the coefficients that do not pass through it.
    expected = STRENGTH * torch.stack([jacobian_sq(layer, sample) for sample in x]).mean()
    torch.testing.assert_close(penalty, expected)
    found = torch.autograd.grad(penalty, [norm.weight, norm.bias])
    for one, other in zip(found, torch.autograd.grad(expected, [norm.weight, norm.bias]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 2, 5, 6)),
        (lambda: nn.Conv2d(2, 4, (3, 2), padding=(2, 1), dilation=(2, 1), groups=2), (2, 2, 5, 4)),
        (lambda: nn.Conv2d(2, 3, 4, padding="same", bias=False), (2, 2, 4, 4)),
        (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 4, 4)),
        (lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2), (2, 2, 6)),
        (lambda: nn.Conv3d(1, 2, 2, padding=1), (1, 1, 2, 2, 2)),
    ],
)
@pytest.mark.parametrize("activation", [nn.Tanh, partial(ck.nn.Polynomial, noise=0.3)], ids=["tanh", "polynomial"])
def test_convolutions_count_the_taps_inside_the_image(convolution, shape, activation):
    torch.manual_seed(1)
    model = nn.Sequential(convolution(), activation()).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = STRENGTH * torch.stack([jacobian_sq(lambda s: model(s[None])[0], sample) for sample in x]).mean()
    reg = ck.DREG(model, STRENGTH)
    model(x)
    penalty = reg.penalty()
    torch.testing.assert_close(penalty, expected)
    for found, wanted in zip(gradients(model, penalty), gradients(model, expected), strict=True):
        torch.testing.assert_close(found, wanted)
    first = reg.jac_sq()["1"][0][0]
    model(x[0])
    torch.testing.assert_close(reg.jac_sq()["1"][0], first)  # without a batch dimension


def test_activation_variant_of_a_convolution_sums_over_channels_and_positions():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()).double()
    reg = ck.DREG(model, STRENGTH, variant="activation")
    y = model(networks.images(5))
    torch.testing.assert_close(reg.penalty(), STRENGTH * (1 - y.square()).square().sum((1, 2, 3)).mean())
    reg.remove()
    reg = ck.DREG(model, STRENGTH, variant="activation", reduction=ck.Reduction(units="mean"))
    y = model(networks.images(5))
    torch.testing.assert_close(reg.penalty(), STRENGTH * (1 - y.square()).square().mean())


def test_channels_last_keeps_its_layout():
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GELU()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 2, 6, 6).to(memory_format=torch.channels_last)
    plain = model(x)
    ck.DREG(model)
    assert model(x).stride() == plain.stride()


# ---- what is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.Tanh(), "tanh"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Softplus(), "softplus"),
        (nn.Mish(), "mish"),
    ],
    ids=str,
)
def test_activation_modules(module, kind):
    (layer,) = discover(nn.Sequential(nn.Linear(2, 2), module)).layers
    assert (layer.kind, layer.activation, layer.linear_name) == (kind, module, "0")


class Calling(nn.Module):
    """A linear layer and a function behind it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


FUNCTIONS = {
    "F.relu": (F.relu, "relu"),
    "F.relu in place": (lambda z: F.relu(z, inplace=True), "relu"),
    "F.relu_": (F.relu_, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "relu()": (lambda z: z.relu(), "relu"),
    "relu_()": (lambda z: z.relu_(), "relu"),
    "F.gelu": (F.gelu, "gelu"),
    "F.gelu tanh": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
    "F.silu": (F.silu, "silu"),
    "torch.tanh": (torch.tanh, "tanh"),
    "F.tanh": (F.tanh, "tanh"),
    "torch.sigmoid": (torch.sigmoid, "sigmoid"),
    "sigmoid()": (lambda z: z.sigmoid(), "sigmoid"),
    "F.softplus": (F.softplus, "softplus"),
    "F.mish": (F.mish, "mish"),
    "casts between": (lambda z: torch.tanh(F.dropout(z.float().contiguous(), 0.0).to(z.dtype)), "tanh"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_functions(name):
    function, kind = FUNCTIONS[name]
    torch.manual_seed(0)
    model = Calling(function)
    (layer,) = discover(model).layers
    assert (layer.kind, layer.activation, layer.linear_name, layer.owner) == (kind, None, "linear", model)
    x = torch.randn(4, 3)
    plain = model(x)
    expected = torch.stack([jacobian_sq(lambda s: function(model.linear(s)), sample) for sample in x])
    reg = ck.DREG(model, STRENGTH)
    torch.testing.assert_close(model(x), plain)
    ((norms,),) = reg.jac_sq().values()
    torch.testing.assert_close(norms, expected)


@pytest.mark.parametrize(
    "index", [(), ..., None, (np.array([1, 0]), slice(1, 2)), (torch.tensor([1, 0]), slice(1, 2))], ids=str
)
def test_what_indexes_that_are_no_slices_take_is_no_part(index):
    torch.manual_seed(0)
    model = Calling(lambda z: torch.tanh(z) + torch.tanh(z[index]).sum())
    model.linear = nn.Linear(3, 4)
    x = torch.randn(2, 3)
    plain = model(x)
    reg = ck.DREG(model, STRENGTH)
    torch.testing.assert_close(model(x), plain)
    expected = torch.stack([jacobian_sq(lambda s: torch.tanh(model.linear(s)), sample) for sample in x])
    ((norms,),) = reg.jac_sq().values()
    torch.testing.assert_close(norms, expected)


class Sine(nn.Module):
    """An activation that is none of ours, as in a sinusoidal representation network."""

    def forward(self, x):
        return torch.sin(30.0 * x)


class Snake(nn.Module):
    """An activation with a number to learn (arXiv 2006.08195)."""

    def __init__(self):
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + torch.sin(self.frequency * x) ** 2 / self.frequency


class ScaledGELU(nn.Module):
    """An activation of ours, times a number to learn that starts at 1."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * F.gelu(x)


def chunked(z):
    value, gate = z.chunk(2, dim=-1)
    return value * F.gelu(gate)


PARTS = {
    "chunk": (lambda: nn.Linear(4, 6), chunked, lambda z: F.gelu(z[..., 3:])),
    "split": (lambda: nn.Linear(4, 6), lambda z: F.silu(z.split([2, 4], -1)[1]), lambda z: F.silu(z[..., 2:])),
    "slice": (lambda: nn.Linear(4, 6), lambda z: z[..., :1] + torch.tanh(z[..., 1:]), lambda z: torch.tanh(z[..., 1:])),
    "of positions": (lambda: nn.Linear(4, 6), lambda z: torch.tanh(z[:, 1:]), torch.tanh),
    "channels": (
        lambda: nn.Conv1d(4, 6, 3, padding=1),
        lambda z: F.silu(torch.chunk(z, 3, dim=1)[1]),
        lambda z: F.silu(z[..., 2:4, :]),
    ),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", PARTS)
def test_an_activation_of_a_part_of_a_linear_map_counts_the_rows_of_that_part(name, compiled):
    build, function, of_part = PARTS[name]
    torch.manual_seed(0)
    model = Calling(function).double()
    model.linear = build().double()
    x = torch.randn(2, 4, 4, dtype=torch.double)
    samples = x if name == "channels" else (x[:, 1:] if name == "of positions" else x).flatten(0, 1)
    expected = torch.stack([jacobian_sq(lambda s: of_part(model.linear(s)), sample) for sample in samples]).mean()
    plain = model(x)
    reg = ck.DREG(model, STRENGTH)
    assert [(row.penalises, row.note) for row in reg.layers] == [("layer", "a part of the weight of linear")]
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    torch.testing.assert_close(run(x), plain)
    penalty = reg.penalty()
    torch.testing.assert_close(penalty, STRENGTH * expected)
    for found, wanted in zip(gradients(model, penalty), gradients(model, STRENGTH * expected), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LeakyReLU(), "not one of the activations"),
        (nn.Softplus(beta=2.0), "not one of the activations"),
        (Calling(F.elu), "not one of the activations"),
        (Calling(torch.celu), "not one of the activations"),
        (Calling(lambda z: z.clamp(min=0.0)), "not one of the activations"),
        (Calling(torch.sin), "not one of the activations"),
        (Calling(partial(F.glu, dim=0)), "not one of the activations"),
        (Sine(), "not one of the activations"),
        (Snake(), "not one of the activations"),
        (Calling(lambda z: z * torch.sigmoid(z)), "multiplied by its input"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh()), "in front of it is an activation"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2), nn.ReLU()), "1 in front of it, a MaxPool2d"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding_mode="circular"), nn.ReLU()), "pads by 'circular'"),
        (nn.Sequential(nn.MaxPool1d(1), nn.LayerNorm(2), nn.ReLU()), "has no linear layer or convolution in front"),
    ],
    ids=lambda value: str(value).replace("\n", "")[:40],
)
def test_what_is_not_a_layer_is_named_with_the_reason(module, reason):
    found = discover(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2), nn.Identity(), module))
    assert any(reason in row.reason for row in found.skipped), found.skipped


def test_a_number_to_learn_behind_an_activation_does_not_hide_it():
    model = nn.Sequential(nn.Linear(4, 3), ScaledGELU()).double()
    reg = ck.DREG(model, STRENGTH)
    assert [row.name for row in reg.layers] == ["gelu behind 0"]
    x = torch.randn(5, 4, dtype=torch.double)
    model(x)
    expected = torch.stack([jacobian_sq(lambda s: F.gelu(model[0](s)), sample) for sample in x]).mean()
    torch.testing.assert_close(reg.penalty(), STRENGTH * expected)


def test_other_norms_between_leave_the_activation_alone():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU()).double()
    reg = ck.DREG(model, STRENGTH)
    (row,) = reg.layers
    assert (row.penalises, row.note) == (
        "activation",
        "1 in front of it, a LayerNorm, does not fold into the weight of 0",
    )
    x = networks.vectors()
    model(x)
    penalty = reg.penalty()
    z = model[:2](x)
    slopes = torch.func.vmap(torch.func.vmap(torch.func.grad(F.gelu)))(z)
    torch.testing.assert_close(penalty, STRENGTH * slopes.square().sum(-1).mean())


def test_nothing_to_regularise_lists_the_candidates():
    model = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(), nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"model: found no layer to regularise in a Sequential(.|\n)*1 \(LeakyReLU\): not one of"
    ):
        ck.DREG(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_long_list_of_candidates_is_cut():
    model = nn.Sequential(*(nn.LeakyReLU() for _ in range(15)))
    with pytest.raises(
        ValueError, match=r"11 \(LeakyReLU\)(.|\n)*and 3 more, which .*discover\(model\).skipped lists$"
    ):
        ck.DREG(model)


def test_the_table_of_what_was_found_has_one_line_for_each_layer():
    lines = str(discover(Calling(F.gelu)).layers).splitlines()
    assert lines[0].split() == ["name", "linear", "name", "function", "kind", "folds", "note"]
    assert len(lines) == 2


def test_discovery_changes_nothing_and_draws_no_random_number():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls, self.kept = nn.Linear(3, 3), 0, []
            self.register_buffer("batches", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.batches.add_(1)
            self.kept.append(x)
            self.latest = x
            return F.relu(self.linear(x) + torch.rand(3))

    model = Counting()
    before, state = dict(model.__dict__), torch.get_rng_state()
    found = discover(model)
    assert found.skipped[0].reason == "the result of add in front of it"
    assert (model.__dict__, model.kept, model.batches.item()) == (before, [], 0.0)
    assert torch.equal(state, torch.get_rng_state())


def test_a_forward_that_cannot_be_traced_is_named_and_its_parts_are_found():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2)])
            self.last = nn.Linear(3, 3)

        def forward(self, x):
            for index in {torch.float32: (0, 1), torch.float64: (1, 0)}[x.dtype]:
                x = self.parts[index](x)
            return F.gelu(self.last(x))

    model = Opaque()
    found = discover(model)
    assert [layer.name for layer in found.layers] == ["parts.0.1", "parts.1.1"]
    ((name, reason),) = [(row.name, row.reason) for row in found.skipped]
    assert name == "the model"
    assert "cannot be traced" in reason


def test_what_a_forward_calls_before_its_trace_breaks_is_found():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.activation, self.last = nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)

        def forward(self, x):
            x = F.silu(self.first(x))
            x = self.activation(self.last(x))
            return x * {torch.float32: 1.0, torch.float64: 2.0}[x.dtype]

    torch.manual_seed(0)
    model = Broken()
    reg = ck.DREG(model)
    assert [row.name for row in reg.layers] == ["silu behind first", "activation"]
    assert [row.name for row in reg.skipped] == ["the model"]
    model(torch.randn(2, 3))
    assert [len(calls) for calls in reg.jac_sq().values()] == [1, 1]


def doubled(forward):
    """A decorator such as other libraries put on a forward, which looks into the keyword arguments."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return 2 * forward(self, *args, scale=kwargs.pop("scale", None) or 1.0, **kwargs)

    return wrapper


class Shapes(nn.Module):
    """Unpacks sizes, loops over positions, and makes an activation for one call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        batch, length, _ = x.shape
        x = self.first(x).reshape(*x.shape[:-1], 2, -1).reshape(batch, length, -1)
        return torch.stack([nn.ReLU()(self.second(x[:, index])) for index in range(length)], dim=1)


class Decorated(Shapes):
    @doubled
    def forward(self, x, *others, scale, mask=None, **options):
        return torch.tanh(self.first(x)) * scale


class Recurrent(Shapes):
    def forward(self, x):
        state = torch.zeros(x.size(0), 4, dtype=x.dtype)
        for index in range(x.size(1)):
            state = torch.tanh(self.second(F.pad(state + x[:, index], (0, 2))))
        return state


class Writing(Shapes):
    def forward(self, x):
        parts = [torch.zeros_like(x), x.clone()]
        for index in range(2):
            parts[index][:, 0] = 1.0
        return torch.sigmoid(self.first(parts[1]))


class Until(Shapes):
    def forward(self, x):
        x = F.gelu(self.first(x))
        while not x.norm() < 1.0:
            x = 0.5 * x
        return x


class Optional(Shapes):
    def forward(self, ids=None, embedded=None, tired=False):
        if (ids is None) == (embedded is None):
            raise ValueError("expected one of ids and embedded")
        return F.silu(self.first(ids))


@pytest.mark.parametrize(
    ("build", "name", "calls"),
    [
        (Shapes, "relu behind second", 3),
        (Decorated, "tanh behind first", 1),
        (Recurrent, "tanh behind second", 3),
        (Writing, "sigmoid behind first", 1),
        (Until, "gelu behind first", 1),
        (Optional, "silu behind first", 1),
    ],
)
def test_forwards_as_other_libraries_write_them(build, name, calls):
    torch.manual_seed(0)
    model = build()
    x = torch.randn(2, 3, 4)
    plain = model(x)
    reg = ck.DREG(model)
    assert [row.name for row in reg.layers] == [name]
    torch.testing.assert_close(model(x), plain)
    assert len(reg.jac_sq()[name]) == calls


def test_an_argument_that_defaults_to_none_and_is_always_given_does_not_hide_the_layers():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, residual=None):
            return F.gelu(self.linear(x)) + residual.float()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()

        def forward(self, x):
            return self.part(x, x)

    reg = ck.DREG(Whole())
    assert [(row.name, row.penalises) for row in reg.layers] == [("gelu behind part.linear", "layer")]
    assert not reg.skipped


def test_a_condition_on_values_does_not_hide_the_layers():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            if x.sum() > 1e9:
                raise ValueError("out of range")
            return torch.tanh(self.linear(x))

    (layer,) = discover(Branching()).layers
    assert layer.linear_name == "linear"


class StochasticDepth(nn.Module):
    """A block of two linear maps, of which each is left out now and then."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if torch.rand(()) < 0.5:
            x = x + F.gelu(self.first(x))
        if random.random() < 0.5:
            x = x + torch.tanh(self.second(x))
        return x


def test_layers_that_a_forward_draws_lots_for_are_found_whatever_it_would_draw():
    model = StochasticDepth()
    for seed in range(4):
        torch.manual_seed(seed)
        random.seed(seed)
        names = [layer.name for layer in discover(model).layers]
        assert names == ["gelu behind first", "tanh behind second"]
    reg = ck.DREG(model)
    ran = set()
    for _ in range(20):
        model(torch.randn(2, 4))
        ran.add(tuple(len(norms) for norms in reg.jac_sq().values()))
    assert len(ran) > 1


class OnRequest(nn.Module):
    """A linear map with an activation that the caller has to ask for."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, both=False):
        x = F.gelu(self.first(x))
        return torch.tanh(self.second(x)) if both else x


def test_a_linear_map_that_the_trace_does_not_show_is_named():
    found = discover(OnRequest())
    assert [layer.name for layer in found.layers] == ["gelu behind first"]
    (row,) = found.skipped
    assert (row.name, row.module) == ("second", "Linear")
    assert row.reason == "what stands behind it is unknown: the forward of the model, a OnRequest, does not call it"


def test_both_ways_through_a_condition_are_looked_at():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            z = self.linear(x)
            if x.sum() > 0:
                return torch.relu(z)
            return torch.tanh(z)

    model = Forked()
    reg = ck.DREG(model)
    for x, name in ((torch.ones(2, 3), "relu behind linear"), (-torch.ones(2, 3), "tanh behind linear")):
        model(x)
        assert [row for row, calls in reg.jac_sq().items() if calls] == [name]


# ---- choosing ------------------------------------------------------------------------------------------------------


def test_layers_by_name_wildcard_and_predicate():
    model, x = built("residual net")
    model.eval()
    for choice, names in [
        ("stem.0", ["relu behind stem.0"]),
        (["first.*", "stem.0"], ["relu behind stem.0", "first.relu", "first.relu behind first.conv1"]),
        (lambda layer: layer.linear is model.second.conv1, ["second.relu behind second.conv1"]),
    ]:
        reg = ck.DREG(model, STRENGTH, layers=choice)
        assert sorted(row.name for row in reg.layers) == sorted(names)
        model(x)
        assert {name for name, calls in reg.jac_sq().items() if calls} == set(names)
        left_out = {row.name for row in reg.skipped}
        assert "second.relu" in left_out
        assert not left_out & set(names)
        reg.remove()


def test_an_activation_behind_a_sum_can_be_asked_for():
    model, x = built("residual net")
    reg = ck.DREG(model, STRENGTH, layers=["first.relu"])
    rows = {row.name: row.penalises for row in reg.layers}
    assert rows == {"first.relu": "activation", "first.relu behind first.conv1": "layer"}
    model(x)
    assert [len(calls) for calls in reg.jac_sq().values()] == [1, 1]


def test_an_activation_asked_for_without_a_linear_map_is_not_given_that_of_a_layer_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.dropout = nn.Linear(4, 5), nn.Linear(5, 5), nn.Dropout(0.0)

        def forward(self, x):
            x = F.relu(self.a(x))
            return F.relu(1 + F.relu(self.dropout(self.b(x))))

    torch.manual_seed(0)
    model = Net()
    reg = ck.DREG(model, layers=["relu behind a", "relu in the model"])
    model(torch.randn(3, 4))
    # The last one is given what is positive everywhere.
    of_a, alone = reg.jac_sq().values()
    assert [len(of_a), [norm.tolist() for norm in alone]] == [1, [[5.0, 5.0, 5.0]]]


class SumOfMaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return F.gelu(x + self.norm(self.convolution(x)))


@pytest.mark.parametrize(
    ("build", "name", "function"),
    [
        (lambda: nn.Sequential(ck.nn.RPKNConv2d(3, 3, 3), ck.nn.ReactPKN()), "1", None),
        (SumOfMaps, "gelu in the model", "gelu"),
        (lambda: nn.Sequential(nn.AvgPool2d(2), nn.GELU()), "1", "gelu"),
    ],
    ids=["behind a polynomial convolution", "behind a sum", "behind a pooling"],
)
def test_the_norm_of_an_activation_alone_is_that_of_an_image(build, name, function):
    torch.manual_seed(0)
    model = build().double()
    reg = ck.DREG(model, layers=[name])
    taken = []

    class Noting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.gelu:
                taken.append(args[0])
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    reg.remove()
    if function is None:
        slope = model[1].coefficients()
        z = model[0](x)
        slopes = slope[1] + 2 * slope[2] * z
    else:
        with Noting():
            model(x)
        slopes = ck.activation_dreg(taken[0], function, return_derivative=True)[2]
    reg = ck.DREG(model, layers=[name])
    model(x)
    (norms,) = reg.jac_sq()[name]
    torch.testing.assert_close(norms, slopes.square().flatten(1).sum(1))


def test_weights_scale_the_terms():
    model, x = built("perceptron")
    model.eval()
    reg = ck.DREG(model, STRENGTH, weights={"0": 3.0})
    assert [row.weight for row in reg.layers] == [3.0, 1.0]
    model(x)
    norms = [calls[0] for calls in reg.jac_sq().values()]
    torch.testing.assert_close(reg.penalty(), STRENGTH * (3.0 * norms[0].mean() + norms[1].mean()))
    reg.remove()
    reg = ck.DREG(model, STRENGTH, weights=lambda layer: 1.0 / layer.units)
    model(x)
    torch.testing.assert_close(reg.penalty(), STRENGTH * (norms[0].mean() / 6 + norms[1].mean() / 5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": "fc"}, ValueError, r"layers: no layer is called 'fc'; there are '1', '5'"),
        ({"layers": []}, ValueError, "layers: expected at least one name, got none"),
        ({"layers": [1]}, TypeError, "layers: expected names, got int"),
        ({"layers": 3}, TypeError, "layers: expected names or a predicate, got int"),
        ({"layers": lambda layer: False}, ValueError, "layers: the predicate chose none of '1', '5'"),
        ({"weights": {"7": 1.0}}, ValueError, r"weights: no layer is called '7'; there are '1', '5'"),
        ({"weights": {"0": "1"}}, TypeError, "weights: expected a number for '0', got str"),
        ({"weights": {"0": -1.0}}, ValueError, "weights: expected a finite number of at least 0 for '0', got -1.0"),
        ({"weights": {"0": 1.0, "1": 2.0}}, ValueError, "weights: several names with different factors match .*'1'"),
        ({"weights": [1.0]}, TypeError, "weights: expected a mapping from names to numbers or a function, got list"),
    ],
)
def test_bad_choices_name_the_argument(options, error, message):
    model, _ = built("perceptron")
    with pytest.raises(error, match=message):
        ck.DREG(model, **options)
    assert all("forward" not in module.__dict__ for module in model.modules())


# ---- token models --------------------------------------------------------------------------------------------------


def test_mask_leaves_padding_out_of_sum_and_mean():
    model, x = built("language model")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    for batch_way in ("mean", "sum"):
        reg = ck.DREG(model, STRENGTH, reduction=ck.Reduction(batch=batch_way))
        model(x)
        terms = [calls[0][mask] for calls in reg.jac_sq().values()]
        expected = sum(getattr(term, batch_way)() for term in terms)
        torch.testing.assert_close(reg.penalty(mask), STRENGTH * expected)
        torch.testing.assert_close(reg.penalty(mask=torch.ones_like(mask)), reg.penalty())
        # Nothing counts: nothing is penalised.
        assert reg.penalty(torch.zeros_like(mask)).item() == 0.0
        reg.remove()


def test_a_mask_of_another_shape_or_dtype_is_refused():
    model, x = built("language model")
    reg = ck.DREG(model, STRENGTH)
    model(x)
    with pytest.raises(ValueError, match=r"mask: expected the shape \(3, 5\) of layer 'gelu behind blocks.0.fc1'"):
        reg.penalty(torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor, got dtype torch.int64"):
        reg.penalty(torch.ones(3, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor, got list"):
        reg.penalty([True])


def test_infinite_padding_does_not_reach_the_penalty():
    model = nn.Sequential(nn.Linear(4, 3), ck.nn.Polynomial(noise=0.3)).double()
    reg = ck.DREG(model)
    x = networks.vectors(4).view(2, 2, 4)
    x[1, 1] = 1e200
    model(x)
    assert not reg.penalty().isfinite()
    penalty = reg.penalty(torch.tensor([[True, True], [True, False]]))
    assert penalty.isfinite()


# ---- composition ---------------------------------------------------------------------------------------------------


def step_function(model, reg):
    def step(x):
        return model(x).square().mean() + reg.penalty()

    return step


@pytest.mark.parametrize("name", NETWORKS)
def test_compile_equals_eager_without_breaks_or_recompiles(name):
    model, _ = built(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = NETWORKS[name][1]
    reg = ck.DREG(model, STRENGTH, schedule=ck.schedules.linear(1.0, 0.0, 10))
    state = copy.deepcopy(model.state_dict())
    eager = step_function(model, reg)
    expected = []
    for count in (6, 7, 9):
        loss = eager(inputs(count))
        expected.append((loss.detach(), *gradients(model, loss)))
        reg.step()
    model.load_state_dict(state)
    reg.load_state_dict({"position": 0})
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count, results in zip((6, 7, 9), expected, strict=True):
            loss = compiled(inputs(count))
            for found, wanted in zip((loss, *gradients(model, loss)), results, strict=True):
                torch.testing.assert_close(found, wanted)
            reg.step()


HIDDEN = {
    "F.tanh": F.tanh,
    "F.sigmoid": F.sigmoid,
    "torch.relu_": torch.relu_,
    "torch.tanh_": torch.tanh_,
    "torch.sigmoid_": torch.sigmoid_,
}


class Breaking(nn.Module):
    """Two layers, with breaks of a compiled graph where they are asked for."""

    def __init__(self, function, breaks: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.function = function
        self.breaks = breaks

    def forward(self, x):
        for place in ("in front", "between", "behind"):
            if place == self.breaks:
                torch._dynamo.graph_break()
            if place == "in front":
                x = self.first(x)
            elif place == "between":
                x = self.function(x)
        return F.gelu(self.second(x))


@pytest.mark.parametrize(
    ("name", "breaks"),
    [*((name, "never") for name in HIDDEN), *(("F.tanh", breaks) for breaks in ("in front", "between", "behind"))],
)
def test_calls_that_dynamo_hides_are_recorded_in_compiled_functions(name, breaks):
    torch.manual_seed(0)
    model, x = Breaking(HIDDEN[name], breaks), torch.randn(3, 4)
    reg = ck.DREG(model)
    eager = step_function(model, reg)
    expected = eager(x)
    assert [len(calls) for calls in reg.jac_sq().values()] == [1, 1]
    compiled = torch.compile(eager, fullgraph=breaks == "never", backend="eager")
    loss = compiled(x)
    assert [len(calls) for calls in reg.jac_sq().values()] == [1, 1]
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_compiled_forward_that_takes_another_way_than_the_trace_showed_is_legal():
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
            self.squashes = True

        def forward(self, x):
            x = self.first(x)
            return F.gelu(self.second(torch.tanh(x) if self.squashes else x))

    torch.manual_seed(0)
    model, x = Choosing(), torch.randn(3, 4)
    reg = ck.DREG(model)
    assert [row.name for row in reg.layers] == ["tanh behind first", "gelu behind second"]
    model.squashes = False
    eager = step_function(model, reg)
    expected = eager(x)
    torch.testing.assert_close(torch.compile(eager, fullgraph=True, backend="eager")(x), expected)
    assert [len(calls) for calls in reg.jac_sq().values()] == [0, 1]


def test_a_torch_that_does_not_say_what_it_hides_is_warned_of(monkeypatch):
    monkeypatch.setattr(interception, "_hidden_calls_are_shown", False)
    monkeypatch.delattr(torch._dynamo.variables.torch, "get_overridable_functions")
    model = Breaking(F.tanh, "never")
    ck.DREG(model)
    with pytest.warns(UserWarning, match=r"left out there: torch.nn.functional.sigmoid, torch.nn.functional.tanh, "):
        model(torch.randn(3, 4))


def test_a_call_on_a_condition_that_is_not_met_does_not_stop_the_compiler():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return torch.tanh(self.second(x)) if x.dim() == 3 else x

    torch.manual_seed(0)
    model = Net()
    reg = ck.DREG(model)
    assert len(reg.layers) == 2
    for shape, counts in (((2, 4), [1, 0]), ((2, 3, 4), [1, 1])):
        torch.compile(model, fullgraph=True, backend="eager")(torch.randn(shape))
        assert [len(calls) for calls in reg.jac_sq().values()] == counts


@pytest.mark.parametrize("name", ["residual net", "language model"])
def test_compile_with_inductor(name):
    model, x = built(name)
    # In float32, since Inductor of torch 2.10 and 2.11 fails on the backward of attention in float64.
    model, x = model.float(), x.float() if x.is_floating_point() else x
    reg = ck.DREG(model, STRENGTH)
    eager = step_function(model, reg)
    loss = eager(x)
    expected = (loss.detach(), *gradients(model, loss))
    loss = torch.compile(eager, fullgraph=True)(x)
    for found, wanted in zip((loss, *gradients(model, loss)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast_penalty_is_float32_and_near(name):
    model, x = built(name)
    model.float().eval()
    x = x.float() if x.is_floating_point() else x
    reg = ck.DREG(model, STRENGTH)
    model(x)
    exact = reg.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        penalty = reg.penalty()
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, exact, rtol=0.05, atol=0.0)
    assert all(gradient.isfinite().all() for gradient in gradients(model, penalty))


@pytest.mark.parametrize("kind", ck.ACTIVATION_KINDS)
def test_autocast_gives_the_dtype_that_it_gives_without_the_regulariser(kind):
    modules = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "relu": nn.ReLU(), "tanh": nn.Tanh()}
    modules |= {"sigmoid": nn.Sigmoid(), "softplus": nn.Softplus(), "mish": nn.Mish()}
    model = nn.Sequential(nn.Linear(4, 4), modules[kind])
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        ck.DREG(model)
        assert model(x).dtype == plain.dtype


class CheckpointedNet(networks.ResidualNet):
    """A residual net whose blocks, or whose parts of blocks, are recomputed in the backward pass."""

    part = "none"

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in (self.first, self.second):
            if self.part == "block":
                x = checkpoint(block, x, use_reentrant=False)
            elif self.part == "inside":
                # The shared activation is called inside the recomputed part and outside of it.
                out = checkpoint(lambda x, block=block: block.relu(block.bn1(block.conv1(x))), x, use_reentrant=False)
                out = block.bn2(block.conv2(out))
                x = block.relu(out + (x if block.shortcut is None else block.shortcut(x)))
            else:
                x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("attached_to", ["the plain model", "the checkpointed model"])
@pytest.mark.parametrize("part", ["block", "inside"])
def test_activation_checkpointing_counts_once(part, attached_to):
    torch.manual_seed(1)
    model, x = CheckpointedNet().double(), networks.images()
    results = []
    for name in ("none", part):
        model.part = name if attached_to == "the checkpointed model" else "none"
        reg = ck.DREG(model, STRENGTH)
        model.part = name
        loss = model(x).square().sum() + reg.penalty()
        assert [len(calls) for calls in reg.jac_sq().values()] == [1, 1, 1]
        results.append((loss, *gradients(model, loss), reg.penalty().detach()))
        reg.remove()
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("variant", ["layer", "activation"])
def test_a_function_inside_a_checkpoint_of_the_same_forward_is_refused(variant, reentrant):
    # In the backward pass PyTorch's tanh would run, which saves its output where DREG's has saved the input.
    model = Calling(None)
    model.function = lambda z: checkpoint(lambda z: torch.tanh(z), z, use_reentrant=reentrant)
    reg = ck.DREG(model, STRENGTH, variant=variant, layers="*")
    with pytest.raises(RuntimeError, match="the forward of a Calling calls tanh inside of a checkpoint"):
        model(torch.randn(2, 3))
    with torch.no_grad(), torch.autograd.graph.save_on_cpu():
        model(torch.randn(2, 3))
    reg.remove()
    whole = Calling(torch.tanh)
    reg = ck.DREG(whole, STRENGTH, variant=variant)
    loss = checkpoint(whole, torch.randn(2, 3), use_reentrant=False).sum() + reg.penalty()
    loss.backward()


class Experts(nn.Module):
    """Two experts, each with the samples that fall to it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        of_second = x[:, 0] > 0
        result = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (~of_second, of_second), strict=True):
            indices = chosen.nonzero().flatten()
            result = result.index_add(0, indices, expert(x[indices]))
        return result


def test_compiled_experts_of_any_number_of_samples():
    torch.manual_seed(0)
    model = Experts()
    reg = ck.DREG(model, STRENGTH)

    def step(x):
        return model(x).square().mean() + reg.penalty()

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for x in (torch.randn(6, 3), torch.randn(9, 3)):
            torch.testing.assert_close(run(x), step(x))


def test_gradient_accumulation_sums_over_the_passes():
    model, _ = built("language model")
    reg = ck.DREG(model, STRENGTH)
    x = networks.tokens(4)
    whole = gradients(model, model(x).square().mean() + reg.penalty())
    for half in x.split(2):
        ((model(half).square().mean() + reg.penalty()) / 2).backward()
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["functional perceptron", "residual net"])
def test_export_gives_the_model_without_the_regulariser(name, strict):
    model, x = built(name)
    model.eval()
    plain = model(x)
    reg = ck.DREG(model, STRENGTH)
    model(x)
    penalty = reg.penalty()
    program = torch.export.export(model, (x,), strict=strict)
    assert not any("chainzrule" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), plain)
    assert torch.equal(reg.penalty(), penalty)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_empty_batch_is_penalised_with_zero(name):
    model, x = built(name)
    model.eval()
    reg = ck.DREG(model, STRENGTH)
    model(x[:0])
    penalty = reg.penalty()
    assert penalty.item() == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(model, penalty))


@pytest.mark.parametrize("copied", ["copy", "stored"])
def test_a_copy_with_its_regulariser_works_on_its_own(copied):
    model, x = built("language model")
    reg = ck.DREG(model, STRENGTH)
    model(x)
    penalty = reg.penalty()
    if copied == "copy":
        twin, twin_reg = copy.deepcopy((model, reg))
    else:
        buffer = io.BytesIO()
        torch.save((model, reg), buffer)
        buffer.seek(0)
        twin, twin_reg = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        for block in twin.blocks:
            block.fc1.weight.mul_(2.0)
    twin(x)
    assert twin_reg.penalty() > penalty
    assert torch.equal(reg.penalty(), penalty)
    twin_reg.remove()
    assert all("forward" not in module.__dict__ for module in twin.modules())
    assert any("forward" in module.__dict__ for module in model.modules())


def test_detach_takes_it_off_a_copy_and_off_the_whole_by_a_part():
    model, x = built("residual net")
    reg = ck.DREG(model, STRENGTH)
    part = copy.deepcopy(model.first)
    ck.DREG.detach(part)
    assert all("forward" not in module.__dict__ for module in part.modules())
    model(x)
    assert reg.penalty().isfinite()
    with pytest.raises(ValueError, match="has a DREG attached already"):
        ck.DREG(model)
    ck.DREG.detach(model.first)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_report_measures_the_nonlinearity_of_convolutions():
    model, x = built("residual net")
    model.eval()
    reg = ck.DREG(model)
    rows = reg.report(x)
    assert [row.name for row in rows] == [name for name, _ in NETWORKS["residual net"][2]]
    conv, norm = model.stem
    jacobians = torch.stack([torch.func.jacrev(lambda s: torch.relu(norm(conv(s[None])))[0])(sample) for sample in x])
    spread = (jacobians - jacobians.mean(0)).square().sum() / jacobians.square().sum()
    assert rows[0].nonlinearity == pytest.approx(spread.item())
    norms = jacobians.flatten(1).norm(dim=1)
    assert rows[0].mean == pytest.approx(norms.mean().item())


# ---- weights that are computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["spectral norm", "weight norm", "old spectral norm"])
def test_computed_weights_are_read_once_and_differentiated(way):
    torch.manual_seed(1)
    linear = nn.Linear(4, 5)
    if way == "spectral norm":
        linear = nn.utils.parametrizations.spectral_norm(linear)
    elif way == "weight norm":
        linear = nn.utils.parametrizations.weight_norm(linear)
    else:
        linear = nn.utils.spectral_norm(linear)
    model = nn.Sequential(linear, nn.GELU()).double()
    twin = copy.deepcopy(model)
    reg = ck.DREG(model, STRENGTH)
    x = networks.vectors()
    model(x)
    twin(x)
    # The power iteration has moved on by one step, as without the regulariser.
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    twin.eval()
    expected = STRENGTH * torch.stack([jacobian_sq(twin, sample) for sample in x]).mean()
    penalty = reg.penalty()
    torch.testing.assert_close(penalty, expected)
    for found, wanted in zip(gradients(model, penalty), gradients(twin, expected), strict=True):
        torch.testing.assert_close(found, wanted)


# ---- other libraries -----------------------------------------------------------------------------------------------

NOT_INSTALLED = "compares with models of {}, an extra of the tests that is not installed"


def from_transformers(name: str):
    transformers = pytest.importorskip("transformers", reason=NOT_INSTALLED.format("transformers"))
    small = {"vocab_size": 11, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    torch.manual_seed(1)
    words = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))
    if name == "GPT-2":
        options = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
        config = transformers.GPT2Config(**options, bos_token_id=0, eos_token_id=0)
        linear, activation = "transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.act"
        return transformers.GPT2LMHeadModel(config), {"input_ids": words}, linear, activation
    if name == "BERT":
        config = transformers.BertConfig(**small, intermediate_size=16, max_position_embeddings=8)
        linear, activation = "encoder.layer.{}.intermediate.dense", "encoder.layer.{}.intermediate.intermediate_act_fn"
        model = transformers.BertModel(config, add_pooling_layer=False)
        return model, {"input_ids": words}, linear, activation
    if name == "Llama":
        config = transformers.LlamaConfig(**small, intermediate_size=16, max_position_embeddings=8)
        return transformers.LlamaModel(config), {"input_ids": words}, "layers.{}.mlp.gate_proj", "layers.{}.mlp.act_fn"
    if name == "OPT":
        # Its forward unpacks shapes and passes keyword arguments on.
        small["word_embed_proj_dim"] = small["hidden_size"]
        config = transformers.OPTConfig(**small, ffn_dim=16, max_position_embeddings=8)
        linear, activation = "decoder.layers.{}.fc1", "decoder.layers.{}.activation_fn"
        return transformers.OPTModel(config), {"input_ids": words}, linear, activation
    small.pop("vocab_size")
    config = transformers.ViTConfig(**small, intermediate_size=16, image_size=4, patch_size=2, num_channels=2)
    model = transformers.ViTModel(config, add_pooling_layer=False)
    return model, {"pixel_values": networks.images(2).float()}, "layers.{}.mlp.fc1", "layers.{}.mlp.activation_fn"


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "ViT", "Llama", "OPT"])
def test_models_of_transformers(name):
    model, inputs, linear, activation = from_transformers(name)
    model.double().eval()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    probe = Probe(model)
    plain = model(**inputs)[0]
    probe.remove()
    expected = torch.zeros((), dtype=torch.float64)
    for index in range(2):
        pair = nn.Sequential(model.get_submodule(linear.format(index)), model.get_submodule(activation.format(index)))
        (received,) = probe.inputs[linear.format(index)]
        expected = expected + torch.stack([jacobian_sq(pair, sample) for sample in received.flatten(0, -2)]).mean()
    reg = ck.DREG(model, STRENGTH)
    assert [row.name for row in reg.layers] == [activation.format(index) for index in range(2)]
    assert all(row.penalises == "layer" for row in reg.layers)
    assert not reg.skipped
    output = model(**inputs)[0]
    torch.testing.assert_close(output, plain)
    penalty = reg.penalty()
    torch.testing.assert_close(penalty, STRENGTH * expected)
    for found, wanted in zip(gradients(model, penalty), gradients(model, STRENGTH * expected), strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(reg.report(**inputs)) == 2


TIMM_MODELS = {
    # Batch norm and activation in one module, a convolution with what squeezes and excites it.
    "efficientnet_b0": ({}, "blocks.0.0.bn1.act", "blocks.0.0.conv_dw"),
    "resnet10t": ({}, "layer1.0.act1", "layer1.0.conv1"),
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 2}, "blocks.0.mlp.act", "blocks.0.mlp.fc1"),
}


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_models_of_timm(name):
    # It imports torchvision, which not every machine has for its torch.
    timm = pytest.importorskip("timm", reason=NOT_INSTALLED.format("timm"), exc_type=ImportError)
    options, activation, linear = TIMM_MODELS[name]
    torch.manual_seed(1)
    model = timm.create_model(name, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    plain = model(x)
    assert (activation, linear) in {(layer.owner_name, layer.linear_name) for layer in discover(model).layers}
    reg = ck.DREG(model, STRENGTH)
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
    assert all(calls for calls in reg.jac_sq().values())
    assert all(gradient.isfinite().all() for gradient in gradients(model, reg.penalty()))

"""swap and unswap: the same model to everyone who holds it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import chainzrule_kernels as ck
from chainzrule_kernels.swap import AbsorbedActivation, SwappedLinear

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "polynomial": lambda: ck.nn.Polynomial(8, noise=0.3),
}


def net(activation: str = "gelu", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    make = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Linear(6, 8), make(), nn.Sequential(nn.Linear(8, 8, bias=False), nn.Identity(), make()), nn.Linear(8, 3)
    ).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_and_gradients_are_the_same_bits(activation, dtype):
    model, x = net(activation, dtype), batch(dtype)
    expected, expected_gradients = model(x), gradients(model, x)
    report = ck.swap(model)
    assert [row.swapped for row in report] == [True, True, False]
    assert {row.function for row in report} == {activation, None}
    assert [(row.linear, row.activation) for row in report] == [("0", "1"), ("2.0", "2.2"), ("3", None)]
    assert torch.equal(model(x), expected)
    assert all(torch.equal(*pair) for pair in zip(gradients(model, x), expected_gradients, strict=True))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            kept = x.clone()
            assert torch.equal(model(x), expected)
            assert torch.equal(x, kept)
    model.requires_grad_(False)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast(activation):
    model, x = net(activation), batch()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(x)
        ck.swap(model)
        found = model(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


class Allocations(TorchDispatchMode):
    """Counts the operators whose result has memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        self.count += result.untyped_storage().data_ptr() not in held
        return result


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "polynomial"])
def test_without_gradients_the_activation_takes_no_memory_of_its_own(activation):
    model, x = net(activation), batch()
    ck.swap(model)
    with torch.no_grad(), Allocations() as allocations:
        model(x)
    assert allocations.count == 3  # one for each linear layer


def test_parameters_and_state_dict_stay_and_an_optimizer_goes_on():
    results = []
    for swapped in (False, True):
        model, x = net("polynomial"), batch()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        before = list(model.named_parameters()), list(model.state_dict())
        for step in range(4):
            if swapped and step == 2:
                ck.swap(model)
                for (name, parameter), (old_name, old) in zip(model.named_parameters(), before[0], strict=True):
                    assert name == old_name
                    assert parameter is old
                assert list(model.state_dict()) == before[1]
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign):
    model, other, x = net("polynomial"), net("polynomial"), batch()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    ck.swap(model)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(model(x), other(x))
    ck.unswap(model)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize(
    "change",
    [lambda model: model.double(), lambda model: model.to_empty(device="cpu").apply(reset)],
    ids=["to another dtype", "to empty memory"],
)
def test_changes_of_every_parameter_reach_the_originals(change):
    model = net("polynomial")
    linear = model[0]
    ck.swap(model)
    change(model)
    x = batch(model[3].weight.dtype)
    swapped = model(x)
    assert linear.weight is model[0].weight
    ck.unswap(model)
    assert torch.equal(model(x), swapped)


def reset(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.fill_(0.1)


def test_unswap_puts_the_very_modules_back():
    model, x = net("polynomial"), batch()
    modules, attributes = dict(model.named_modules()), {n: set(m.__dict__) for n, m in model.named_modules()}
    expected = model(x)
    ck.swap(model)
    assert isinstance(model[0], SwappedLinear)
    assert isinstance(model[1], AbsorbedActivation)
    model.eval()
    assert ck.unswap(model) == 2
    assert dict(model.named_modules()) == modules
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(x), expected)
    assert ck.unswap(model) == 0


def test_swap_twice_changes_nothing_more():
    model, x = net(), batch()
    ck.swap(model)
    first = model[0]
    assert not any(row.swapped for row in ck.swap(model))
    assert model[0] is first
    assert ck.unswap(model) == 2
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), net()(x))


def stored(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, stored])
@pytest.mark.parametrize("activation", ["gelu", "polynomial"])
def test_copies_are_independent_and_can_be_unswapped(activation, copied):
    model, x = net(activation), batch()
    ck.swap(model)
    expected = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    changed = twin(x)
    assert not torch.equal(changed, expected)
    assert torch.equal(model(x), expected)
    assert ck.unswap(twin) == 2
    assert torch.equal(twin(x), changed)
    assert isinstance(model[0], SwappedLinear)


@pytest.mark.parametrize("activation", ["gelu", "polynomial"])
def test_compile_and_export(activation):
    torch._dynamo.reset()
    model, x = net(activation), batch()
    ck.swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (5, 7, 11):
            samples = torch.randn(count, 6)
            torch.testing.assert_close(compiled(samples), model(samples))
            expected = gradients(model, samples)
            for found, reference in zip(gradients(compiled, samples), expected, strict=True):
                torch.testing.assert_close(found, reference)
    model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for samples in (x, torch.randn(9, 6)):
        torch.testing.assert_close(program.module()(samples), model(samples))
    assert set(program.state_dict) == set(model.state_dict())


def test_transforms():
    model, x = net(dtype=torch.float64), batch(torch.float64)
    expected = torch.func.vmap(torch.func.jacrev(model))(x), torch.func.vmap(torch.func.jacfwd(model))(x)
    ck.swap(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(model))(x), expected[0])
    model.requires_grad_(False)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(model))(x), expected[1])


# ---- what is left alone ----------------------------------------------------------------------------------------------


class Adapted(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *arguments: None)
    return module


class ByHand(nn.Module):
    """A forward of the caller's, over a linear layer ``a`` and an activation ``b``."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.written = forward
        self.a, self.b = nn.Linear(6, 6), nn.GELU()
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.written(self, x)


class Choosing(ByHand):
    def forward(self, x, before=False):
        z = self.a(x)
        return z if before else self.b(z)


def test_forwards_written_by_hand():
    torch.manual_seed(0)
    x = batch()
    shared = ByHand(lambda m, x: m.b(m.c(m.b(m.a(x)))), c=nn.Linear(6, 6))
    nested = ByHand(lambda m, x: m.net(x).relu() + m.b(m.a(x)), net=nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    for model, count in ((shared, 2), (nested, 2), (ByHand(lambda m, x: torch.cat([m.b(m.a(x)), x])), 1)):
        expected, modules = model(x), dict(model.named_modules())
        report = ck.swap(model)
        assert [row.swapped for row in report] == [True] * count, str(report)
        assert torch.equal(model(x), expected)
        assert ck.unswap(model) == count
        assert dict(model.named_modules()) == modules


@pytest.mark.parametrize(
    ("forward", "linear_note", "activation_note"),
    [
        (lambda m, x: m.b(m.a(x) + x), "a call of add in the model behind it", "no torch.nn.Linear alone in front"),
        (lambda m, x: torch.relu(m.b(x)) + m.a(x), "a call of add in the model behind it", "no torch.nn.Linear alone"),
        (lambda m, x: m.a(m.b(x)), "the end of the model behind it", "no torch.nn.Linear alone in front of it"),
        (lambda m, x: m.b(x), "no forward that could be traced calls it", "no torch.nn.Linear alone in front"),
        (lambda m, x: m.b(m.a(x)) + m.b(x), "b stands behind something else as well", "b stands behind something else"),
        (lambda m, x: m.b(m.a(x)) if x.sum() > 0 else x, "the forward of the model cannot be traced", "the forward of"),
    ],
)
def test_forwards_that_use_the_parts_in_other_ways(forward, linear_note, activation_note):
    model = ByHand(forward)
    expected, modules = model(batch()), dict(model.named_modules())
    linear, activation = ck.swap(model)
    assert linear.note.startswith(linear_note)
    assert activation.note.startswith(activation_note)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(batch()), expected)


def test_an_output_that_is_used_twice_is_left_alone():
    def forward(model, x):
        z = model.a(x)
        return model.b(z) * z

    model = ByHand(forward)
    assert [row.note for row in ck.swap(model)] == [
        "its output is used more than once",
        "no torch.nn.Linear alone in front of it",
    ]


def test_a_part_of_a_sequential_that_is_called_for_itself_is_left_alone():
    model = ByHand(lambda m, x: m.net[0](x) + m.net(x), net=nn.Sequential(nn.Linear(6, 6), nn.GELU()))
    rows = {row.linear or row.activation: row.note for row in ck.swap(model)}
    assert rows["net.0"] == "a call of add in the model behind it, no activation module"


def test_an_argument_that_chooses_the_way_is_respected():
    model = Choosing(None)
    (linear, _) = ck.swap(model)
    assert linear.note == "the forward of the model cannot be traced: its argument before=False may choose what it does"


@pytest.mark.parametrize(
    ("build", "row"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()),
            ("0", None, "1 behind it, a LayerNorm: n"),
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU()), ("0", None, "1 behind it, a Dropout: not")),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softplus(2.0)), ("0", None, "1 behind it, a Softplus: not one of")),
        (lambda: nn.Sequential(nn.Linear(4, 4)), ("0", None, "the end of the model behind it, no activation module")),
        (lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), (None, "0", "no torch.nn.Linear alone in front of it")),
        (lambda: nn.ModuleDict({"a": nn.Linear(4, 4)}), ("a", None, "the forward of the model cannot be traced:")),
        (lambda: nn.Sequential(Adapted(4, 4), nn.ReLU()), ("0", None, "0 is a Adapted, a class of its own")),
        (lambda: nn.Sequential(hooked(nn.Linear(4, 4)), nn.ReLU()), ("0", None, "0 has hooks, which would see other")),
        (lambda: nn.Sequential(nn.Linear(4, 4), hooked(nn.ReLU())), ("0", None, "1 has hooks, which would see other")),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.ReLU()),
            ("0", None, "0 is a ParametrizedLinear, a class of its own"),
        ),
    ],
)
def test_what_is_left_alone_says_why(build, row):
    model = build()
    modules = dict(model.named_modules())
    found = ck.swap(model)[0]
    assert (found.linear, found.activation) == row[:2]
    assert not found.swapped
    assert found.note.startswith(row[2])
    assert dict(model.named_modules()) == modules
    assert row[2] in str(ck.swap(model))


# ---- under DREG ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["layer", "activation"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dreg_on_a_swapped_model_is_dreg_on_the_plain_one(activation, variant):
    x, results = batch(torch.float64), []
    for swapped in (False, True):
        model = net(activation, torch.float64)
        if swapped:
            ck.swap(model)
        reg = ck.DREG(model, 0.7, variant=variant)
        loss = model(x).square().mean() + reg.penalty()
        report = reg.report(x)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        results[-1] += tuple(torch.tensor([row.mean, row.p99, row.nonlinearity]) for row in report)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_modules_that_stand_in_several_places():
    torch.manual_seed(0)
    activation, linear = nn.GELU(), nn.Linear(6, 6)
    model, x = nn.Sequential(linear, activation, nn.Linear(6, 6), activation, linear, activation), batch()
    expected, keys, slots = model(x), list(model.state_dict()), dict(model._modules)
    assert [row.swapped for row in ck.swap(model)] == [True, True]
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert model[4] is model[0]
    ck.unswap(model)
    assert model._modules == slots
    assert torch.equal(model(x), expected)
    ending = nn.Sequential(linear, activation, linear)
    assert ck.swap(ending)[0].note == "the end of the model behind it, no activation module"


def test_bad_input():
    for call in (ck.swap, ck.unswap):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
            call(3)
    model = nn.Sequential(nn.Linear(4, 4), ck.nn.Polynomial())
    ck.DREG(model)
    for call in (ck.swap, ck.unswap):
        with pytest.raises(ValueError, match="model: a DREG is attached to its layer '0'"):
            call(model)

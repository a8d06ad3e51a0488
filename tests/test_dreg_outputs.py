"""DREG leaves outputs alone where that is hard: activations in place, modules that do more than compute."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import chainzrule_kernels as ck
from chainzrule_kernels.dreg import discover


class InPlace(nn.Module):
    """A linear layer with an activation in place behind it."""

    def __init__(self, relu: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.relu = nn.ReLU(inplace=True) if relu is None else relu

    def forward(self, x):
        hidden = self.linear(x)
        return self.relu(hidden), hidden


class ReturningOnRequest(InPlace):
    def forward(self, x, with_hidden=False):
        hidden = self.linear(x)
        y = self.relu(hidden)
        return (y, hidden) if with_hidden else (y,)


class Branching(InPlace):
    def forward(self, x):
        hidden = self.linear(x)
        y = self.relu(hidden)
        return (y + hidden,) if x.sum() > 0 else (y,)


class Viewing(InPlace):
    def forward(self, x):
        hidden = self.linear(x)
        flat = hidden.view(-1)
        hidden.relu_()
        return (flat,)


class BehindDropout(InPlace):
    def forward(self, x):
        hidden = self.linear(x)
        return self.relu(F.dropout(hidden, 0.0, False)), hidden


class Keeping(InPlace):
    def forward(self, x):
        self.hidden = self.linear(x)
        self.relu(self.hidden)
        return (x,)


class OverwritingReLU(nn.Module):
    def forward(self, x):
        return x.relu_()


class Inside(InPlace):
    """The linear map and the activation in parts of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(self.linear), nn.Sequential(self.relu)

    def forward(self, x, with_hidden=False):
        hidden = self.first(x)
        y = self.second(hidden)
        return (y, hidden) if with_hidden else (y,)


USES = {
    "returned": (InPlace, {}),
    "returned on request": (ReturningOnRequest, {"with_hidden": True}),
    "used in one branch": (Branching, {}),
    "seen through a view": (Viewing, {}),
    "used behind dropout": (BehindDropout, {}),
    "written by hand": (lambda: InPlace(OverwritingReLU()), {}),
    "in parts": (Inside, {"with_hidden": True}),
}


@pytest.mark.parametrize("name", USES)
def test_an_activation_in_place_overwrites_what_others_see(name):
    build, options = USES[name]
    torch.manual_seed(0)
    model = build().double()
    x = torch.rand(4, 3, dtype=torch.double, requires_grad=True)
    plain = copy.deepcopy(model)(x, **options)
    expected = torch.autograd.grad(sum(y.sin().sum() for y in plain), x)
    reg = ck.DREG(model, 1.0)
    outputs = model(x, **options)
    torch.testing.assert_close(outputs, plain, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(sum(y.sin().sum() for y in outputs), x), expected)
    model(x, **options)
    slopes = (model.linear(x) > 0).double()
    torch.testing.assert_close(reg.penalty(), (slopes @ model.linear.weight.square().sum(1)).mean())
    compiled = torch.compile(lambda x: (model(x, **options), reg.penalty()), backend="aot_eager", fullgraph=True)
    # A branch on values breaks any graph, and PyTorch's dropout is no alias of its input in a compiled one.
    if name not in ("used in one branch", "used behind dropout"):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(x), (plain, reg.penalty()))


def test_an_activation_in_place_overwrites_what_the_model_or_a_hook_keeps():
    torch.manual_seed(0)
    model = Keeping()
    reg = ck.DREG(model)
    model(torch.randn(4, 3))
    assert reg.penalty() > 0
    assert bool((model.hidden >= 0).all())

    kept = []
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    model[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    ck.DREG(model)
    y = model(torch.randn(4, 3))
    assert torch.equal(kept[0], y)


@pytest.mark.parametrize("between", ["nothing", "dropout", "batch norm", "layer norm", "a cast", "F.batch_norm"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_a_forward_overwrites_behind_a_view_is_no_layer_in_that_pass(context, between):
    """An inference tensor would not count that it has been written to."""

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            modules = {"dropout": nn.Dropout(), "batch norm": nn.BatchNorm1d(3), "layer norm": nn.LayerNorm(3)}
            self.linear, self.between = nn.Linear(3, 3), modules.get(between, nn.Identity())
            self.overwrites = True

        def forward(self, x):
            hidden = self.between(self.linear(x))
            if between == "a cast":
                hidden = hidden.double()
            if between == "F.batch_norm":
                hidden = F.batch_norm(hidden, None, None, training=True)
            if self.overwrites:
                hidden.view(-1).add_(1.0)
            return torch.tanh(hidden)

    torch.manual_seed(0)
    model, x = Overwriting().eval(), torch.randn(4, 3)
    plain = copy.deepcopy(model)
    reg = ck.DREG(model)
    assert len(reg.layers) == 1
    with context():
        torch.testing.assert_close(model(x), plain(x))
        assert reg.jac_sq() == {reg.layers[0].name: []}
        model.overwrites = False
        model(x)
        norms = reg.jac_sq()[reg.layers[0].name]
    assert len(norms) == 1
    assert norms[0].shape == (4,)


def test_dropout_in_place_works_on_inference_tensors_too():
    class Dropping(nn.Module):
        """One dropout behind a linear layer and on an inference tensor, as Monte Carlo dropout runs it."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5, inplace=True)

        def forward(self, x):
            return self.dropout(x + torch.tanh(self.dropout(self.linear(x))))

    model = Dropping()
    plain, x = copy.deepcopy(model), torch.randn(4, 3)
    ck.DREG(model)
    with torch.inference_mode():
        torch.manual_seed(0)
        y = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(y, plain(x))


def test_an_activation_in_place_that_nobody_else_sees_needs_no_copy():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.SiLU(True))
    assert [(layer.in_place, layer.overwrites_unseen) for layer in discover(model).layers] == [(True, True)] * 2


# ---- modules of others ---------------------------------------------------------------------------------------------


class OtherInTraining(nn.Module):
    def forward(self, x):
        return torch.relu(x + 1.0) if self.training else torch.relu(x)


class Clipped(nn.Module):
    def forward(self, x):
        return torch.relu(x).clamp(max=100.0)


class KeepingItsOutput(nn.Module):
    def forward(self, x):
        self.latest = F.gelu(x)
        return self.latest


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x):
        self.calls.append(1)
        return F.gelu(x)


@pytest.mark.parametrize("activation", [OtherInTraining, Clipped, KeepingItsOutput, Counting])
@pytest.mark.parametrize("training", [True, False])
def test_a_module_that_is_no_mere_activation_is_not_replaced(activation, training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), activation(), nn.Linear(3, 3), nn.GELU()).train(not training)
    plain = copy.deepcopy(model).train(training)
    x = 1e3 * torch.randn(4, 3)
    ck.DREG(model)
    model.train(training)
    torch.testing.assert_close(model(x), plain(x))
    assert set(vars(model[1])) - {"forward"} == set(vars(plain[1]))
    assert vars(model[1]).get("calls") == vars(plain[1]).get("calls")


def test_a_module_called_a_norm_with_layers_inside_is_looked_into():
    class LinearNorm(nn.Module):  # of speech synthesis models: a linear layer whose initial weight is scaled
        def __init__(self):
            super().__init__()
            self.linear, self.activation = nn.Linear(3, 3), nn.ReLU()

        def forward(self, x):
            return self.linear(self.activation(self.linear(x)))

    names = [(layer.linear_name, layer.name) for layer in discover(nn.Sequential(LinearNorm(), nn.Tanh())).layers]
    assert names == [("0.linear", "0.activation"), ("0.linear", "1")]


# ---- calls by keyword ----------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def forward(self, first, second, scale=1.0):
        return F.gelu(first) + scale * torch.tanh(second)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.both, self.last = nn.Linear(3, 3), nn.Linear(3, 3), TwoInputs(), nn.Linear(3, 3)

    def forward(self, x):
        x = self.both(second=self.second(input=x), first=self.first(x))
        return F.gelu(approximate="tanh", input=F.dropout(p=0.0, input=self.last(x)))


def test_arguments_by_keyword_in_any_order():
    torch.manual_seed(0)
    model = ByKeyword()
    reg = ck.DREG(model)
    assert [row.name for row in reg.layers] == ["gelu behind first", "tanh behind second", "gelu behind last"]
    model(torch.randn(4, 3))
    assert [len(calls) for calls in reg.jac_sq().values()] == [1, 1, 1]


# ---- modules of PyTorch with ways of their own -----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", nn.GELU()], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_encoder_of_pytorch_in_evaluation(activation, nested):
    """It would run as one kernel there, past the activation, and on nested tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation=activation)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, padding = torch.randn(2, 3, 4), torch.tensor([[False, False, True], [False, False, False]])
    reg = ck.DREG(model)
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        norms = reg.jac_sq()
    assert [calls[0].shape for calls in norms.values()] == [(2, 3), (2, 3)]
    assert len(reg.report(x)) == 2
    reg.remove()
    with torch.no_grad():
        torch.testing.assert_close(y[~padding], model(x, src_key_padding_mask=padding)[~padding])


def test_lazy_modules():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2), nn.GELU()
    )
    reg = ck.DREG(model, 1.0)
    x = torch.randn(2, 2, 4, 4)
    model(x)
    penalty = reg.penalty()
    reg.remove()
    anew = ck.DREG(model, 1.0)
    assert anew.layers == reg.layers
    model(x)
    torch.testing.assert_close(anew.penalty(), penalty)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_are_named():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), nn.Linear(3, 3), nn.GELU())
    reg = ck.DREG(model)
    assert [row.name for row in reg.layers] == ["2"]
    assert {row.name for row in reg.skipped} == {"0", "0.0", "0.1"}
    with pytest.raises(ValueError, match=r"model: found no layer(.|\n)*its forward has no signature"):
        ck.DREG(torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)))

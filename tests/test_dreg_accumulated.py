"""DREG's accumulated variant: the Jacobian from the model's input to each layer's output, against torch.func.jacrev."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import chainzrule_kernels as ck
from tests.networks import NETWORKS

STRENGTH = 0.7
# For each network, the modules that take the outputs of its layers.
BEHIND = {
    "perceptron": ["2", "6"],
    "functional perceptron": ["second", "third", "last"],
    "residual net": ["first.conv1", "first.conv2", "second.conv2"],
    "vision transformer": ["blocks.0.fc2", "blocks.1.fc2"],
    "language model": ["blocks.0.fc2", "blocks.1.fc2"],
}


def built(name: str, count: int = 3) -> tuple[nn.Module, Tensor]:
    """A network of NETWORKS in float64 and evaluation mode, where samples do not mix, and a batch for it."""
    build, inputs, _ = NETWORKS[name]
    torch.manual_seed(1)
    return build().double().eval(), inputs(count)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


def layer_outputs(name: str, model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the layers of a network give out."""
    received: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(behind).register_forward_pre_hook(
            lambda module, args, behind=behind: received.__setitem__(behind, args[0])
        )
        for behind in BEHIND[name]
    ]
    try:
        with sdpa_kernel(SDPBackend.MATH):  # which double backward needs
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [received[behind] for behind in BEHIND[name]]


def jacobians(name: str, model: nn.Module, x: Tensor) -> list[Tensor]:
    """For each layer ``∂y_l/∂x`` of each sample, ``(B, *outputs, *inputs)``; differentiable."""
    if name != "language model":
        return list(jacobian_of_samples(lambda sample: layer_outputs(name, model, sample[None]), x))

    def from_embedding(embedded: Tensor) -> list[Tensor]:
        handle = model.tokens.register_forward_hook(lambda *_: embedded[None])
        try:
            return layer_outputs(name, model, x[:1])
        finally:
            handle.remove()

    return list(jacobian_of_samples(from_embedding, model.tokens(x)))


def jacobian_of_samples(function, x: Tensor) -> list[Tensor]:
    by_sample = [torch.func.jacrev(lambda sample: tuple(y[0] for y in function(sample)))(sample) for sample in x]
    return [torch.stack(layer) for layer in zip(*by_sample, strict=True)]


def expected_norms(name: str, model: nn.Module, x: Tensor) -> list[Tensor]:
    """``‖G_l‖_F²`` for each sample, and for each position of a token model."""
    inputs = {"residual net": 3, "vision transformer": 3, "language model": 2}.get(name, 1)
    kept = {"residual net": 1, "vision transformer": 2, "language model": 2}.get(name, 1)
    norms = []
    for jacobian in jacobians(name, model, x):
        over_inputs = jacobian.square().flatten(-inputs).sum(-1)
        norms.append(over_inputs.flatten(kept).sum(-1))
    return norms


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_penalty_and_its_gradients_are_those_of_explicit_jacobians(name):
    model, x = built(name)
    expected = expected_norms(name, model, x)
    reg = ck.DREG(model, STRENGTH, variant="accumulated", probes="exact")
    assert [(row.name, row.penalises) for row in reg.layers] == [
        (layer, "accumulated") for layer, _ in NETWORKS[name][2]
    ]
    model(x)
    for (found,), wanted in zip(reg.jac_sq().values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    penalty = reg.penalty()
    total = STRENGTH * sum(norms.mean() for norms in expected)
    torch.testing.assert_close(penalty, total)
    for found, wanted in zip(gradients(model, penalty), gradients(model, total), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("name", ["perceptron", "residual net"])
def test_probes_are_gaussian_directions_through_the_same_jacobians(name, probes):
    model, x = built(name)
    expected = jacobians(name, model, x)
    reg = ck.DREG(model, STRENGTH, variant="accumulated", probes=probes)
    model(x)
    torch.manual_seed(5)
    found = reg.jac_sq()
    torch.manual_seed(5)
    directions = torch.empty(probes, *x.shape, dtype=x.dtype).normal_()
    for (norms,), jacobian in zip(found.values(), expected, strict=True):
        matrices = jacobian.reshape(x.shape[0], -1, x[0].numel())
        along = torch.einsum("bij,tbj->tbi", matrices, directions.flatten(2))
        torch.testing.assert_close(norms, along.square().sum(-1).mean(0))


def test_estimate_is_unbiased():
    model, x = built("perceptron", 2)
    exact = expected_norms("perceptron", model, x)
    reg = ck.DREG(model, variant="accumulated", probes=4000)
    torch.manual_seed(2)
    model(x)
    for (found,), wanted in zip(reg.jac_sq().values(), exact, strict=True):
        # The variance of ‖G v‖² is at most 2 ‖G‖_F⁴; five standard deviations of the mean.
        assert ((found - wanted).abs() < 5 * (2 / 4000) ** 0.5 * wanted).all()


def test_polynomial_layers_one_behind_the_other():
    torch.manual_seed(1)
    net = ck.nn.ChainzRuleNet((4, 5, 6, 3), noise=0.3, dtype=torch.float64)
    net.append(nn.Linear(3, 2).double())
    net.append(ck.nn.Polynomial(2, noise=0.3, dtype=torch.float64))
    x = NETWORKS["perceptron"][1](4)
    expected = [
        torch.stack([torch.func.jacrev(net[:count])(sample) for sample in x]).square().sum((1, 2))
        for count in (1, 2, 5)
    ]
    reg = ck.DREG(net, STRENGTH, variant="accumulated", probes="exact")
    net(x)
    for (found,), wanted in zip(reg.jac_sq().values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    penalty, total = reg.penalty(), STRENGTH * sum(norms.mean() for norms in expected)
    for found, wanted in zip(gradients(net, penalty), gradients(net, total), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 5), ck.nn.PolyReLU()), (4,)),
        (lambda: ck.nn.PolynomialConv2d(2, 3, 3, padding=1, noise=0.3), (2, 4, 3)),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), ck.nn.ReactPKN()), (2, 4, 3)),
    ],
    ids=["PolyReLU", "PolynomialConv2d", "ReactPKN"],
)
def test_the_first_layer_has_accumulated_its_own_jacobian(build, shape):
    torch.manual_seed(1)
    model = build().double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    jacobians = torch.stack([torch.func.jacrev(lambda s: model(s[None])[0])(sample) for sample in x])
    for options in ({"variant": "layer"}, {"variant": "accumulated", "probes": "exact"}):
        reg = ck.DREG(model, **options)
        model(x)
        ((norms,),) = reg.jac_sq().values()
        torch.testing.assert_close(norms, jacobians.square().flatten(1).sum(1))
        reg.remove()


def test_start_is_where_the_jacobian_begins():
    model, x = built("vision transformer")
    reg = ck.DREG(model, variant="accumulated", probes="exact", start="blocks.0.fc1")
    model(x)
    norms = reg.jac_sq()["blocks.0.act"][0]
    reg.remove()
    z = model.blocks[0].fc1
    received = []
    handle = z.register_forward_hook(lambda module, args, output: received.append(output))
    model(x)
    handle.remove()
    slopes = torch.vmap(torch.vmap(torch.vmap(torch.func.grad(nn.GELU()))))(received[0])
    torch.testing.assert_close(norms, slopes.square().sum(-1))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.LayerNorm(4),
        nn.InstanceNorm1d(3, affine=True),
        nn.GroupNorm(1, 3),
        nn.RMSNorm(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_gradients_go_through_the_statistics_of_norms(norm):
    # With those of the batch, samples mix: then the direction is that of the whole batch.
    torch.manual_seed(1)
    images = not isinstance(norm, nn.BatchNorm1d | nn.LayerNorm | nn.RMSNorm)
    front = nn.Conv1d(2, 3, 2) if images else nn.Linear(4, 4)
    model = nn.Sequential(front, copy.deepcopy(norm), nn.Linear(4, 3), nn.Tanh()).double()
    x = torch.randn(2, 2, 5, dtype=torch.float64) if images else NETWORKS["perceptron"][1](4)
    reg = ck.DREG(model, STRENGTH, variant="accumulated")
    torch.manual_seed(5)
    model(x)
    penalty = reg.penalty()
    torch.manual_seed(5)
    direction = torch.empty_like(x).normal_()
    reg.remove()
    jacobian = torch.func.jacrev(model)(x)
    along = torch.einsum("ij,j->i", jacobian.reshape(-1, x.numel()), direction.flatten())
    expected = STRENGTH * along.square().sum() / (along.numel() / 3)
    torch.testing.assert_close(penalty, expected)
    for found, wanted in zip(gradients(model, penalty), gradients(model, expected), strict=True):
        torch.testing.assert_close(found, wanted)


def test_mask_and_reductions():
    model, x = built("language model")
    reg = ck.DREG(
        model, STRENGTH, variant="accumulated", probes="exact", reduction=ck.Reduction(units="mean", layers="mean")
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    model(x)
    means = [norms[mask].mean() / 8 for (norms,) in reg.jac_sq().values()]
    torch.testing.assert_close(reg.penalty(mask), STRENGTH * sum(means) / 2)


# ---- beside the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_buffers_and_random_numbers_are_those_without_it(name):
    model, x = built(name)
    model.train()
    twin = copy.deepcopy(model)
    reg = ck.DREG(model, STRENGTH, variant="accumulated", probes=2)
    results = []
    for each in (model, twin):
        torch.manual_seed(4)
        y = each(x)
        results.append((y, torch.rand(3), *each.buffers()))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
    penalty = reg.penalty()
    assert penalty.isfinite()
    assert torch.equal(penalty, reg.penalty())
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)
    reg.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not model._forward_pre_hooks


def test_dropout_is_that_of_the_forward_pass():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 2)).double()
    reg = ck.DREG(model, variant="accumulated", probes="exact")
    outputs = []
    model[2].register_forward_hook(lambda module, args, output: outputs.append(output))
    x = NETWORKS["perceptron"][1](1)
    model(x)
    reg.penalty()
    first, again = outputs
    # The same units were dropped, so the same are zero.
    assert torch.equal(first == 0, _plain(again) == 0)


def _plain(value: Tensor) -> Tensor:
    """A tensor that a torch.func transform has left behind, without its wrapper."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def test_no_grad_and_evaluation_report():
    model, x = built("residual net")
    expected = expected_norms("residual net", model, x)
    reg = ck.DREG(model, variant="accumulated", probes="exact")
    with torch.no_grad():
        model(x)
    penalty = reg.penalty()
    assert not penalty.requires_grad
    rows = reg.report(2 * x)
    assert torch.equal(penalty, reg.penalty())
    for row, again, norms in zip(rows, reg.report(x), expected, strict=True):
        assert row.nonlinearity is None
        assert again.mean == pytest.approx(norms.sqrt().mean().item())


def test_autocast_of_the_forward_pass_holds_for_the_tangents():
    model, x = built("perceptron")
    model.float()
    reg = ck.DREG(model, STRENGTH, variant="accumulated", probes="exact")
    model(x.float())
    exact = reg.penalty()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(x.float())
    penalty = reg.penalty()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, exact, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_refused_rather_than_losing_the_tangents(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=reentrant)

    net, x = built("perceptron")
    model = Checkpointed(net)
    reg = ck.DREG(model, variant="accumulated")
    model(x)
    with pytest.raises(RuntimeError, match="does not go with activation checkpointing"):
        reg.penalty()


def test_gradient_accumulation_sums_over_the_passes():
    model, x = built("vision transformer", 4)
    reg = ck.DREG(model, STRENGTH, variant="accumulated", probes="exact")
    whole = gradients(model, model(x).square().mean() + reg.penalty())
    for half in x.split(2):
        ((model(half).square().mean() + reg.penalty()) / 2).backward()
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["perceptron", "language model"])
def test_an_empty_batch_is_penalised_with_zero(name):
    model, x = built(name)
    reg = ck.DREG(model, STRENGTH, variant="accumulated")
    model(x[:0])
    assert reg.penalty().item() == 0.0


def test_copies_work_on_their_own():
    model, x = built("language model")
    reg = ck.DREG(model, STRENGTH, variant="accumulated", probes="exact")
    model(x)
    twin, twin_reg = copy.deepcopy((model, reg))
    penalty = reg.penalty()
    twin(x)
    torch.testing.assert_close(twin_reg.penalty(), penalty)


def test_compile_is_refused():
    model, x = built("perceptron")
    reg = ck.DREG(model, variant="accumulated")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"torch.compile cannot trace"):
        torch.compile(lambda x: model(x).sum() + reg.penalty(), fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probes": 0}, ValueError, "probes: expected at least 1, got 0"),
        ({"probes": "all"}, ValueError, "probes: expected a number of probes or 'exact', got 'all'"),
        ({"probes": 1.5}, TypeError, "probes: expected a number of probes or 'exact', got float"),
        ({"start": 3}, TypeError, "start: expected the name of a module, got int"),
        ({"start": "stem"}, ValueError, "start: expected the name of a module in the Sequential, got 'stem'"),
        ({"start": "0", "variant": "layer"}, ValueError, "start: belongs to the variant 'accumulated'"),
        ({"probes": 2, "variant": "layer"}, ValueError, "probes: expected 1"),
    ],
)
def test_bad_input_names_the_argument(options, error, message):
    model, _ = built("perceptron")
    with pytest.raises(error, match=message):
        ck.DREG(model, **{"variant": "accumulated", **options})
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_model_without_a_place_for_tangents_says_so():
    class OneHot(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, index):
            return self.act(self.linear(nn.functional.one_hot(index, 4).float()))

    model = OneHot()
    ck.DREG(model, variant="accumulated")
    with pytest.raises(ValueError, match="needs a floating-point tensor among the arguments of the model"):
        model(torch.tensor([1, 2]))


class Doubling(nn.Sequential):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def test_an_input_that_was_written_to_is_refused_rather_than_used_anew():
    layers = nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)
    x = torch.randn(5, 3)
    model = nn.Sequential(*layers)
    reg = ck.DREG(model, variant="accumulated", probes="exact")
    model(x)
    x.mul_(2)  # a data loader that uses its buffer again
    with pytest.raises(RuntimeError, match="has been written to since"):
        reg.penalty()
    model(x)
    assert reg.penalty() > 0
    reg.remove()
    overwriting = Doubling(*layers)
    reg = ck.DREG(overwriting, variant="accumulated", probes="exact")
    overwriting(x)
    kept = x.clone()
    with pytest.raises(RuntimeError, match="has been written to since"):
        reg.penalty()
    assert torch.equal(x, kept)

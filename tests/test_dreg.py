"""DREG: the penalty against Jacobians computed one by one, and its life beside the rest of PyTorch."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import chainzrule_kernels as ck

STRENGTH = 0.7


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No compiled code of another test, which would count as a recompilation."""
    torch._dynamo.reset()


def net_of(*sizes: int, **options) -> ck.nn.ChainzRuleNet:
    torch.manual_seed(1)
    return ck.nn.ChainzRuleNet(sizes, noise=0.3, **{"dtype": torch.float64, **options})


def batch(count: int, features: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, features, dtype=dtype, generator=torch.Generator().manual_seed(count))


def squared_jacobian_norms(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``‖J‖_F²`` of a layer at each sample, from the whole Jacobian."""
    jacobians = torch.stack([torch.func.jacrev(layer)(sample) for sample in x])
    return jacobians.square().sum((1, 2))


def squared_slopes(coeffs: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """``Σ_j p'(z_j)²`` for each sample, from the formula."""
    slope = sum(power * coeffs[power] * z ** (power - 1) for power in range(1, coeffs.shape[0]))
    return slope.square().sum(-1)


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("degree", [1, 3, 8])
def test_jac_sq_of_polynomial_linear_is_the_norm_of_its_jacobian(degree, per_channel):
    layer = ck.nn.PolynomialLinear(4, 5, degree=degree, per_channel=per_channel, noise=0.3, dtype=torch.float64)
    x = batch(6, 4)
    _, jac_sq = ck.linear_polynomial_dreg(x, layer.weight, layer.bias, layer.coeffs)
    torch.testing.assert_close(jac_sq, squared_jacobian_norms(layer, x))


def test_penalty_and_its_gradients_are_those_of_explicit_jacobians():
    net = net_of(4, 5, 6, 3)
    reg = ck.DREG(net, STRENGTH)
    x = batch(7, 4)
    net(x)
    penalty = reg.penalty()
    assert penalty.shape == ()
    found = gradients(net, penalty)
    reg.remove()
    hidden = net[0](x)
    # jacrev inside autograd: differentiated with respect to the parameters as well, by double backward.
    expected = STRENGTH * (squared_jacobian_norms(net[0], x).mean() + squared_jacobian_norms(net[1], hidden).mean())
    torch.testing.assert_close(penalty, expected)
    for gradient, reference in zip(found, gradients(net, expected), strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, reference)


def test_activation_variant_leaves_the_weights_out():
    net = net_of(4, 5, 6, 3)
    reg = ck.DREG(net, STRENGTH, variant="activation")
    x = batch(7, 4)
    net(x)
    first, second = net[0], net[1]
    z_1 = F.linear(x, first.weight, first.bias)
    z_2 = F.linear(first(x), second.weight, second.bias)
    expected = STRENGTH * (squared_slopes(first.coeffs, z_1).mean() + squared_slopes(second.coeffs, z_2).mean())
    net(x)
    torch.testing.assert_close(reg.penalty(), expected)
    assert [row.penalises for row in reg.layers] == ["activation", "activation"]


@pytest.mark.parametrize("batch_way", ["mean", "sum"])
@pytest.mark.parametrize("units_way", ["mean", "sum"])
@pytest.mark.parametrize("layers_way", ["mean", "sum"])
def test_reductions(batch_way, units_way, layers_way):
    net = net_of(4, 5, 6, 3)
    reg = ck.DREG(net, STRENGTH, reduction=ck.Reduction(batch_way, units_way, layers_way))
    x = batch(7, 4)
    hidden = net[0](x)
    net(x)
    total = 0.0
    for layer, inputs, units in ((net[0], x, 5), (net[1], hidden, 6)):
        norms = squared_jacobian_norms(layer, inputs)
        value = norms.mean() if batch_way == "mean" else norms.sum()
        total = total + (value / units if units_way == "mean" else value)
    torch.testing.assert_close(reg.penalty(), STRENGTH * (total / 2 if layers_way == "mean" else total))


def test_polynomial_behind_linear_in_a_sequential():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.Dropout(0.5), ck.nn.Polynomial(5, noise=0.3), nn.Linear(5, 3), ck.nn.Polynomial(noise=0.3)
    ).double()
    reg = ck.DREG(model, STRENGTH)
    assert [(row.name, row.units, row.penalises) for row in reg.layers] == [("2", 5, "layer"), ("4", 3, "layer")]
    assert [row.note for row in reg.layers] == ["the weight of 0", "the weight of 3"]
    model.eval()
    x = batch(6, 4)
    model(x)
    hidden = model[:3](x)
    expected = squared_jacobian_norms(model[:3], x).mean() + squared_jacobian_norms(model[3:], hidden).mean()
    model(x)
    torch.testing.assert_close(reg.penalty(), STRENGTH * expected)


class Adapted(nn.Linear):
    """A linear layer with something more behind the product with its weight, as adapters have it."""

    def forward(self, x):
        return 2.0 * super().forward(x)


def linear_with_a_forward_put_on_it() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: 2.0 * nn.Linear.forward(linear, x)
    return linear


@pytest.mark.parametrize(
    ("build", "note"),
    [
        (lambda: nn.Sequential(Adapted(4, 4), ck.nn.Polynomial()), "0 in front of it, a Adapted, has a forward of"),
        (
            lambda: nn.Sequential(linear_with_a_forward_put_on_it(), ck.nn.Polynomial()),
            "0 in front of it, a Linear, has a forward of its own",
        ),
        (lambda: nn.Sequential(ck.nn.Polynomial()), "nothing in front of it"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), ck.nn.Polynomial()), "1 in front of it, a LayerNorm"),
        (lambda: nn.ModuleDict({"part": ck.nn.Polynomial()}), "a ModuleDict, has no forward"),
    ],
)
def test_polynomial_without_a_known_linear_is_penalised_alone_and_says_so(build, note):
    (row,) = ck.DREG(build()).layers
    assert (row.penalises, row.units) == ("activation", None)
    assert note in row.note


def test_a_subclass_of_linear_with_the_forward_of_linear_counts():
    class Named(nn.Linear):
        pass

    (row,) = ck.DREG(nn.Sequential(Named(4, 5), ck.nn.Polynomial())).layers
    assert (row.penalises, row.units) == ("layer", 5)


def test_polynomial_shared_behind_two_layers_is_penalised_with_each_weight():
    shared = ck.nn.Polynomial(noise=0.3)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 3), shared).double()
    reg = ck.DREG(model, STRENGTH)
    assert [(row.name, row.penalises, row.units) for row in reg.layers] == [
        ("1 behind 0", "layer", 4),
        ("1 behind 2", "layer", 3),
    ]
    x = batch(6, 4)
    model(x)
    penalty = reg.penalty()
    hidden = model[:2](x)
    expected = squared_jacobian_norms(model[:2], x).mean() + squared_jacobian_norms(model[2:], hidden).mean()
    torch.testing.assert_close(penalty, STRENGTH * expected)


def test_leading_dimensions_are_all_batch():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    x = batch(6, 4)
    net(x)
    flat = reg.penalty()
    net(x.view(2, 3, 4))
    torch.testing.assert_close(reg.penalty(), flat)


def test_penalty_dtype_and_device_follow_the_data():
    net = net_of(4, 5, 3, dtype=torch.bfloat16)
    reg = ck.DREG(net)
    net(batch(6, 4, torch.bfloat16))
    assert reg.penalty().dtype == torch.float32
    net.double()
    net(batch(6, 4))
    assert reg.penalty().dtype == torch.float64


@pytest.mark.parametrize("step", ["nothing", "move the schedule"])
def test_strength_is_exact_when_the_model_becomes_float64_later(step):
    net = net_of(4, 5, 3, dtype=torch.float32)
    reg = ck.DREG(net, STRENGTH)
    if step != "nothing":
        reg.step()
    net.double()
    net(batch(6, 4))
    ((jac_sq,),) = reg.jac_sq().values()
    torch.testing.assert_close(reg.penalty(), STRENGTH * jac_sq.mean(), rtol=1e-15, atol=0.0)


def test_a_model_regularised_on_the_meta_device():
    net = net_of(4, 5, 3, device="meta")
    reg = ck.DREG(net, STRENGTH)
    net.to_empty(device="cpu")
    net.load_state_dict(net_of(4, 5, 3).state_dict())
    x = batch(6, 4)
    net(x)
    torch.testing.assert_close(reg.penalty(), STRENGTH * squared_jacobian_norms(net[0], x).mean())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("way", ["mean", "sum"])
def test_penalty_does_not_depend_on_the_number_of_threads(way):
    net = net_of(4, 2, 1, dtype=torch.float32)
    reg = ck.DREG(net, reduction=ck.Reduction(batch=way))
    x = batch(1_000_000, 4, torch.float32)
    # Several inputs, since two orders of a sum often round to the same number.
    for scale in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5):
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                net(scale * x)
                results.append((reg.jac_sq()["0"][0], reg.penalty()))
        (norms, penalty), (norms_again, penalty_again) = results
        assert torch.equal(norms, norms_again)
        assert torch.equal(penalty, penalty_again)
        exact = norms.double().mean() if way == "mean" else norms.double().sum()
        torch.testing.assert_close(penalty.double(), reg.strength * exact, rtol=1e-6, atol=0.0)


def test_autocast_penalty_is_float32_and_near():
    net = net_of(4, 5, 3, dtype=torch.float32)
    reg = ck.DREG(net)
    x = batch(6, 4, torch.float32)
    net(x)
    exact = reg.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        penalty = reg.penalty()
    assert y.dtype == torch.bfloat16
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, exact, rtol=0.02, atol=0.0)
    assert all(gradient.isfinite().all() for gradient in gradients(net, penalty) if gradient is not None)


# ---- which pass it speaks of ---------------------------------------------------------------------------------------


def test_penalty_before_any_pass_says_so():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    net[0](batch(6, 4))  # a part of the model on its own is no pass of the model
    for ask in (reg.penalty, reg.report):
        with pytest.raises(RuntimeError, match="no forward pass of the model has been recorded"):
            ask()


def test_penalty_is_of_the_latest_pass_and_repeats():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    net(batch(6, 4))
    first = reg.penalty()
    assert torch.equal(first, reg.penalty())
    net(3 * batch(6, 4))
    second = reg.penalty()
    assert not torch.equal(first, second)
    net[0](batch(6, 4))
    assert torch.equal(second, reg.penalty())


def test_layers_that_did_not_run_contribute_nothing():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = ck.nn.PolynomialLinear(4, 5, noise=0.3, dtype=torch.float64)
            self.right = ck.nn.PolynomialLinear(4, 5, noise=0.3, dtype=torch.float64)

        def forward(self, x, side):
            return getattr(self, side)(x)

    model = Either()
    reg = ck.DREG(model, STRENGTH)
    x = batch(6, 4)
    for side in ("left", "right"):
        model(x, side)
        torch.testing.assert_close(reg.penalty(), STRENGTH * squared_jacobian_norms(getattr(model, side), x).mean())


def test_a_pass_that_failed_leaves_the_next_one_right():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    x = batch(6, 4)
    net(x)
    expected = reg.penalty()
    with pytest.raises(ValueError, match="x: expected shape"):
        net(batch(6, 5))
    net[0](x)
    with pytest.raises(RuntimeError, match="did not reach its end"):
        reg.penalty()
    net(x)
    assert torch.equal(reg.penalty(), expected)


class Failing(nn.Module):
    """Two polynomial layers, with an exception between them on demand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = ck.nn.PolynomialLinear(4, 5, noise=0.3, dtype=torch.float64)
        self.second = ck.nn.PolynomialLinear(5, 3, noise=0.3, dtype=torch.float64)
        self.error: BaseException | None = None

    def forward(self, x):
        hidden = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(hidden)


@pytest.mark.parametrize("error", [ValueError("on demand"), KeyboardInterrupt("on demand")])
def test_a_pass_that_ended_halfway_is_not_taken_for_a_whole_one(error):
    model = Failing()
    reg = ck.DREG(model, STRENGTH)
    x = batch(6, 4)
    model(x)
    expected = reg.penalty()
    for asks_in_between in (True, False):
        model.error = error
        with pytest.raises(type(error), match="on demand"):
            model(x)
        for ask in (reg.penalty, reg.report, reg.jac_sq) if asks_in_between else ():
            with pytest.raises(RuntimeError, match="did not reach its end"):
                ask()
        model.error = None
        model(x)
        assert torch.equal(reg.penalty(), expected)
        assert [len(calls) for calls in reg.jac_sq().values()] == [1, 1]


def test_a_failing_hook_of_another_leaves_the_latest_pass_or_none():
    def fail(*arguments):
        raise ValueError("on demand")

    net = net_of(4, 5, 3)
    before = net.register_forward_pre_hook(fail)  # runs before the hooks of the regulariser
    reg = ck.DREG(net, STRENGTH)
    before.remove()
    x = batch(6, 4)
    net(x)
    expected = reg.penalty()
    with net.register_forward_pre_hook(fail, prepend=True), pytest.raises(ValueError, match="on demand"):
        net(3 * x)
    assert torch.equal(reg.penalty(), expected)
    with net.register_forward_pre_hook(fail), pytest.raises(ValueError, match="on demand"):
        net(3 * x)
    with pytest.raises(RuntimeError, match="did not reach its end"):
        reg.penalty()
    net(x)
    assert torch.equal(reg.penalty(), expected)


class Recursive(nn.Module):
    """A model that calls itself, with a layer before and a layer behind the call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.down = ck.nn.PolynomialLinear(4, 4, noise=0.3, dtype=torch.float64)
        self.up = ck.nn.PolynomialLinear(4, 4, noise=0.3, dtype=torch.float64)
        self.fails_at = -1

    def forward(self, x, depth):
        if depth == self.fails_at:
            raise ValueError("on demand")
        x = self.down(x)
        if depth:
            try:
                x = self(x, depth - 1)
            except ValueError:
                x = 0.5 * x
        return self.up(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_calls_itself_is_one_pass(compiled):
    model = Recursive()
    reg = ck.DREG(model, STRENGTH)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = batch(6, 4)
    for _ in range(2):
        run(x, 2)
        assert [len(calls) for calls in reg.jac_sq().values()] == [3, 3]
    values, expected = x, 0.0
    for layer in (model.down, model.down, model.down, model.up, model.up, model.up):
        expected = expected + squared_jacobian_norms(layer, values).mean()
        values = layer(values)
    torch.testing.assert_close(reg.penalty(), STRENGTH * expected)


def test_an_exception_that_the_model_catches_from_itself_does_not_end_the_pass():
    model = Recursive()
    model.fails_at = 0
    reg = ck.DREG(model, STRENGTH)
    model(batch(6, 4), 2)
    assert [len(calls) for calls in reg.jac_sq().values()] == [2, 2]
    assert reg.penalty().isfinite()


def test_a_pass_in_which_no_regularised_layer_ran_says_so():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ck.nn.PolynomialLinear(4, 5, dtype=torch.float64)

        def forward(self, x):
            return x

    model = Skipping()
    reg = ck.DREG(model)
    model(batch(6, 4))
    for ask in (reg.penalty, reg.report):
        with pytest.raises(RuntimeError, match="no regularised layer ran"):
            ask()


def test_replicas_are_refused():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net, STRENGTH)
    x = batch(6, 4)
    net(x)
    expected = reg.penalty()
    replica = net._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"replica made by torch.nn.DataParallel.*DistributedDataParallel"):
        replica(x)
    assert torch.equal(reg.penalty(), expected)
    # Where the regulariser is attached to what contains the replicas, its layers notice.
    layer, polynomial = net[0], ck.nn.Polynomial(dtype=torch.float64)
    ck.DREG(polynomial)
    for module in (layer, polynomial):
        replica = module._replicate_for_data_parallel()
        for name, value in module._parameters.items():
            setattr(replica, name, value.detach())
        with pytest.raises(RuntimeError, match=r"replica made by torch.nn.DataParallel"):
            replica.forward(x)


def test_evaluation_and_no_grad():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    x = batch(6, 4)
    net(x)
    expected = reg.penalty()
    net.eval()
    with torch.no_grad():
        net(x)
        penalty = reg.penalty()
    assert torch.equal(penalty, expected)
    assert not penalty.requires_grad
    with torch.inference_mode():
        net(x)
        assert torch.equal(reg.penalty(), expected)


def test_gradient_accumulation_sums_over_the_passes():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net, STRENGTH)
    x = batch(8, 4)
    loss = net(x).square().mean() + reg.penalty()
    whole = gradients(net, loss)
    for half in x.split(4):
        ((net(half).square().mean() + reg.penalty()) / 2).backward()
    for parameter, gradient in zip(net.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# ---- the life of the graph -----------------------------------------------------------------------------------------


def test_backward_frees_what_the_forward_saved():
    net = net_of(4, 5, 5, 3)
    reg = ck.DREG(net)
    saved: list[weakref.ref] = []

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        held = Held(tensor)
        saved.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = net(batch(6, 4)).sum() + reg.penalty()
    assert any(held() is not None for held in saved)
    loss.backward()
    del loss
    gc.collect()
    assert [held for held in saved if held() is not None] == []
    assert reg.penalty().isfinite()


class Checkpointed(nn.Module):
    """Two polynomial layers, the first of which is recomputed in the backward pass."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = ck.nn.PolynomialLinear(4, 5, noise=0.3, dtype=torch.float64)
        self.second = ck.nn.PolynomialLinear(5, 3, noise=0.3, dtype=torch.float64)
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.second(self.first(x))
        return self.second(checkpoint(self.first, x, use_reentrant=self.reentrant))


def test_activation_checkpointing_counts_once():
    x = batch(6, 4).requires_grad_()
    results = []
    for model in (Checkpointed(None), Checkpointed(False)):
        reg = ck.DREG(model, STRENGTH)
        loss = model(x).square().sum() + reg.penalty()
        results.append((loss, *gradients(model, loss), reg.penalty().detach()))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_checkpointing_the_whole_model_counts_once():
    net = net_of(4, 5, 6, 3)
    reg = ck.DREG(net, STRENGTH)
    x = batch(6, 4)
    plain = gradients(net, net(x).square().sum() + reg.penalty())
    checkpointed = gradients(net, checkpoint(net, x, use_reentrant=False).square().sum() + reg.penalty())
    assert all(torch.equal(*pair) for pair in zip(plain, checkpointed, strict=True))


def test_reentrant_checkpointing_is_refused_rather_than_losing_the_gradient():
    model = Checkpointed(True)
    reg = ck.DREG(model)
    loss = model(batch(6, 4).requires_grad_()).sum() + reg.penalty()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()


# ---- attaching, copying, leaving -----------------------------------------------------------------------------------


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def hooks(model: nn.Module) -> int:
    return sum(
        len(value)
        for module in model.modules()
        for name, value in module.__dict__.items()
        if "hooks" in name and value is not None
    )


def test_remove_leaves_no_trace():
    net = net_of(4, 5, 5, 3)
    x = batch(6, 4)
    before = attributes(net), hooks(net), list(net.state_dict()), net(x)
    reg = ck.DREG(net)
    assert torch.equal(net(x), before[-1])
    assert list(net.state_dict()) == before[2]
    reg.remove()
    assert (attributes(net), hooks(net), list(net.state_dict())) == before[:3]
    assert torch.equal(net(x), before[-1])
    with pytest.raises(RuntimeError, match="no forward pass"):
        reg.penalty()
    second = ck.DREG(net)
    reg.remove()  # again: nothing happens to the one that came after
    net(x)
    assert second.penalty().isfinite()


def test_outputs_and_task_gradients_do_not_change_while_attached():
    net = net_of(4, 5, 5, 3)
    x = batch(6, 4)
    plain = net(x)
    plain_gradients = gradients(net, plain.square().sum())
    ck.DREG(net)
    regularised = net(x)
    assert torch.equal(plain, regularised)
    for before, after in zip(plain_gradients, gradients(net, regularised.square().sum()), strict=True):
        torch.testing.assert_close(before, after)


def test_deepcopy_of_model_and_regulariser_together():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    x = batch(6, 4)
    net(x)
    penalty = reg.penalty()
    twin, twin_reg = copy.deepcopy((net, reg))
    with pytest.raises(RuntimeError, match="no forward pass"):
        twin_reg.penalty()
    with torch.no_grad():
        twin[0].weight.mul_(2.0)
    twin(x)
    assert twin_reg.penalty() > penalty
    assert torch.equal(reg.penalty(), penalty)
    twin_reg.remove()
    assert hooks(twin) == 0
    assert hooks(net) == 4  # three on the model, one of them listed as always called


def test_a_copy_of_the_model_alone_does_not_disturb_the_original():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    x = batch(6, 4)
    net(x)
    penalty = reg.penalty()
    twin = copy.deepcopy(net)
    assert torch.equal(twin(2 * x), net(2 * x))
    net(x)
    twin(2 * x)
    assert torch.equal(reg.penalty(), penalty)


def stored(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        stored,
        lambda net: nn.Sequential(copy.deepcopy(net)),
        lambda net: nn.Sequential(copy.deepcopy(net[0]), copy.deepcopy(net[1])),
        lambda net: copy.deepcopy(net)[:2],  # a part of a copy that has its regulariser
    ],
    ids=["copy", "stored", "inside another", "layers alone", "part of a copy"],
)
def test_a_copy_can_be_regularised_anew(copied):
    net = net_of(4, 5, 3, final_polynomial=True)
    reg = ck.DREG(net, STRENGTH)
    x = batch(6, 4)
    net(x)
    expected = reg.penalty()
    twin = copied(net)
    with pytest.raises(ValueError, match=r"has a DREG attached already.*chainzrule_kernels.DREG.detach\(model\)"):
        ck.DREG(twin)
    ck.DREG.detach(twin)
    assert hooks(twin) == 0
    assert not any("jacobian_record" in names for names in attributes(twin).values())
    ck.DREG.detach(twin)  # nothing there: nothing happens
    twin_reg = ck.DREG(twin, 2 * STRENGTH)
    twin(x)
    assert torch.equal(twin_reg.penalty(), 2 * expected)
    assert torch.equal(reg.penalty(), expected)  # the original has its own still
    net(x)
    assert torch.equal(reg.penalty(), expected)


def test_detach_from_a_part_takes_the_regulariser_off_the_whole():
    net = net_of(4, 5, 5, 3)
    reg = ck.DREG(net)
    x = batch(6, 4)
    net(x)
    ck.DREG.detach(net[0])
    assert hooks(net) == 0
    assert not any("jacobian_record" in names for names in attributes(net).values())
    net(x)
    with pytest.raises(RuntimeError, match="no forward pass"):
        reg.penalty()
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got DREG"):
        ck.DREG.detach(reg)


def test_a_regularised_model_can_be_saved_whole():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net, schedule=ck.schedules.linear(1.0, 0.0, 10))
    x = batch(6, 4)
    net(x)
    buffer = io.BytesIO()
    torch.save((net, reg), buffer)
    buffer.seek(0)
    twin, twin_reg = torch.load(buffer, weights_only=False)
    twin(x)
    assert torch.equal(twin_reg.penalty(), reg.penalty())


# ---- the schedule --------------------------------------------------------------------------------------------------


def test_schedule_scales_the_strength_and_its_position_is_its_state():
    net = net_of(4, 5, 3)
    schedule = ck.schedules.linear(1.0, 0.0, 4)
    reg = ck.DREG(net, STRENGTH, schedule=schedule)
    x = batch(6, 4)
    net(x)
    base = reg.penalty()
    for step in range(1, 6):
        reg.step()
        assert reg.strength == STRENGTH * schedule(step)
        torch.testing.assert_close(reg.penalty(), base * schedule(step))
    state = reg.state_dict()
    assert state == {"position": 5}
    reg.remove()
    other = ck.DREG(net, STRENGTH, schedule=schedule)
    other.load_state_dict({"position": 2})
    net(x)
    torch.testing.assert_close(other.penalty(), base * 0.5)
    for state in ({"step": 2}, {"position": True}, {"position": 1.5}, {"position": -1}, {}):
        with pytest.raises(ValueError, match="state: expected the keys and values"):
            other.load_state_dict(state)
    with pytest.raises(TypeError, match=r"state: expected what DREG.state_dict\(\) returns, got int"):
        other.load_state_dict(5)
    assert other.state_dict() == {"position": 2}


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (lambda step: 0.5 - step, ValueError, "schedule: expected a finite number of at least 0 at step 1, got -0.5"),
        (lambda step: math.nan if step else 1.0, ValueError, "schedule: .* at step 1, got nan"),
        (lambda step: "half" if step else 1.0, TypeError, "schedule: .* gives a number, got str at step 1"),
    ],
)
def test_a_schedule_that_gives_no_strength_is_refused(schedule, error, message):
    reg = ck.DREG(net_of(2, 2, 2), STRENGTH, schedule=schedule)
    with pytest.raises(error, match=message):
        reg.step()


def test_a_schedule_that_fails_at_once_leaves_the_model_as_it_is():
    net = net_of(2, 2, 2)
    attributes = [set(module.__dict__) for module in net.modules()]
    with pytest.raises(ValueError, match="at step 0, got -1"):
        ck.DREG(net, schedule=lambda step: -1.0)
    assert [set(module.__dict__) for module in net.modules()] == attributes
    assert not net._forward_hooks
    ck.DREG(net)


def test_a_step_before_the_backward_does_not_disturb_it():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net, STRENGTH, schedule=ck.schedules.linear(1.0, 0.0, 4))
    x = batch(6, 4)
    net(x)
    expected = gradients(net, reg.penalty())
    net(x)
    penalty = reg.penalty()
    reg.step()
    for before, after in zip(expected, gradients(net, penalty), strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


def test_jac_sq_is_of_each_layer_and_sample():
    net = net_of(4, 5, 6, 3)
    reg = ck.DREG(net)
    assert reg.jac_sq() == {"0": [], "1": []}
    x = batch(6, 4)
    net(x)
    norms = reg.jac_sq()
    torch.testing.assert_close(norms["0"], [squared_jacobian_norms(net[0], x)])
    torch.testing.assert_close(norms["1"], [squared_jacobian_norms(net[1], net[0](x))])


# ---- the report ----------------------------------------------------------------------------------------------------


def test_report_is_of_the_norms_of_the_latest_pass():
    net = net_of(4, 5, 6, 3)
    reg = ck.DREG(net)
    x = batch(50, 4)
    hidden = net[0](x)
    net(x)
    for row, layer, inputs in zip(reg.report(), (net[0], net[1]), (x, hidden), strict=True):
        norms = squared_jacobian_norms(layer, inputs).sqrt().detach()
        assert row.mean == pytest.approx(norms.mean().item())
        assert row.p99 == pytest.approx(norms.quantile(0.99).item())
        assert row.tail_ratio == pytest.approx(row.p99 / row.mean)
        assert row.nonlinearity is None


def test_report_of_an_empty_batch_is_nan_and_no_error():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    net(batch(0, 4))
    (row,) = reg.report()
    assert row.name == "0"
    assert all(map(math.isnan, (row.mean, row.p99, row.tail_ratio)))


@pytest.mark.parametrize("variant", ["layer", "activation"])
def test_report_on_inputs_measures_the_nonlinearity_and_leaves_the_latest_pass(variant):
    net = net_of(4, 5, 6, 3)
    with torch.no_grad():
        net[1].coeffs.copy_(ck.coefficients.identity(3))
    reg = ck.DREG(net, variant=variant)
    x = batch(50, 4)
    net(batch(6, 4))
    penalty = reg.penalty()
    net[1].eval()
    curved, straight = reg.report(x)
    assert net[0].training
    assert not net[1].training
    assert torch.equal(reg.penalty(), penalty)
    layer = net[0]
    z = F.linear(x, layer.weight, layer.bias)
    slope = torch.func.vmap(torch.func.grad(lambda value: ck.reference.polynomial(value[None], layer.coeffs)[0]))
    slope = slope(z.flatten()).view_as(z)[:, :, None]
    jacobians = slope * layer.weight if variant == "layer" else slope * torch.eye(5, dtype=torch.float64)
    mean = jacobians.mean(0)
    expected = (jacobians - mean).square().sum((1, 2)).mean() / jacobians.square().sum((1, 2)).mean()
    assert curved.nonlinearity == pytest.approx(expected.item())
    assert straight.nonlinearity == pytest.approx(0.0, abs=1e-15)
    assert reg.report()[0].nonlinearity is None


def test_report_on_inputs_leaves_no_state_behind_when_it_fails():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    net(batch(6, 4))
    penalty = reg.penalty()
    with pytest.raises(ValueError, match="x: expected shape"):
        reg.report(batch(6, 5))
    assert torch.equal(reg.penalty(), penalty)
    assert net.training
    assert reg.report()[0].nonlinearity is None


# ---- torch.compile -------------------------------------------------------------------------------------------------


def step_function(net, reg):
    def step(x):
        return net(x).square().mean() + reg.penalty()

    return step


@pytest.mark.parametrize("variant", ["layer", "activation"])
@pytest.mark.parametrize("what", ["function", "model", "model in place"])
def test_compile_equals_eager_without_breaks_or_recompiles(what, variant):
    net = net_of(4, 5, 6, 3)
    reg = ck.DREG(net, STRENGTH, variant, schedule=ck.schedules.linear(1.0, 0.0, 100))
    eager = step_function(net, reg)
    expected = []
    for count in (7, 8, 11):
        loss = eager(batch(count, 4))
        expected.append((loss.detach(), *gradients(net, loss)))
        reg.step()
    reg.load_state_dict({"position": 0})
    options = {"fullgraph": True, "backend": "aot_eager", "dynamic": True}
    if what == "function":
        compiled = torch.compile(eager, **options)
    elif what == "model":
        compiled = step_function(torch.compile(net, **options), reg)
    else:
        net.compile(**options)
        compiled = eager
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count, results in zip((7, 8, 11), expected, strict=True):
            loss = compiled(batch(count, 4))
            for found, wanted in zip((loss, *gradients(net, loss)), results, strict=True):
                torch.testing.assert_close(found, wanted)
            reg.step()


def test_compile_recompiles_when_the_model_without_it_does():
    counts = []
    for regularised in (False, True):
        torch._dynamo.reset()
        net = net_of(4, 5, 6, 3)
        step = step_function(net, ck.DREG(net, STRENGTH)) if regularised else net
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        for count in (7, 8, 11, 3, 7):
            compiled(batch(count, 4))
        counts.append(counter.frame_count)
    assert counts == [2, 2]  # the first batch, and then one of any size


def test_compile_with_inductor():
    net = net_of(4, 5, 6, 3, dtype=torch.float32)
    reg = ck.DREG(net, STRENGTH)
    eager = step_function(net, reg)
    x = batch(7, 4, torch.float32)
    loss = eager(x)
    expected = (loss.detach(), *gradients(net, loss))
    loss = torch.compile(eager, fullgraph=True)(x)
    for found, wanted in zip((loss, *gradients(net, loss)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_compile_with_checkpointing():
    plain, checkpointed = Checkpointed(None), Checkpointed(False)
    x = batch(7, 4)
    reg = ck.DREG(plain, STRENGTH)
    loss = step_function(plain, reg)(x)
    expected = (loss.detach(), *gradients(plain, loss))
    step = step_function(checkpointed, ck.DREG(checkpointed, STRENGTH))
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        for found, wanted in zip((loss, *gradients(checkpointed, loss)), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_attaching_and_removing_after_compilation_takes_effect():
    net = net_of(4, 5, 3)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = batch(6, 4)
    plain = compiled(x)
    reg = ck.DREG(compiled)
    torch.testing.assert_close(compiled(x), plain)
    penalty = reg.penalty()
    net(x)
    torch.testing.assert_close(penalty, reg.penalty())
    reg.remove()
    torch.testing.assert_close(compiled(x), plain)
    with pytest.raises(RuntimeError, match="no forward pass"):
        reg.penalty()


def test_functional_call_and_grad():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net, STRENGTH)
    x = batch(6, 4)
    parameters = dict(net.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(net, parameters, (x,)).square().sum() + reg.penalty()

    found = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    expected = gradients(net, net(x).square().sum() + reg.penalty())
    for gradient, reference in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("way", ["vmap", "vmap of grad", "grad of vmap", "jacfwd"])
def test_vmap_leaves_the_latest_pass_alone(way):
    net = net_of(4, 5, 3)
    reg = ck.DREG(net, STRENGTH)
    x = batch(6, 4)
    net(x)
    expected, report = reg.penalty(), reg.report()
    if way == "vmap":
        torch.vmap(net)(x)
    elif way == "vmap of grad":
        torch.vmap(torch.func.grad(lambda sample: net(sample).sum()))(x)
    elif way == "grad of vmap":
        torch.func.grad(lambda values: torch.vmap(net)(values).sum())(x)
    else:
        torch.func.jacfwd(net)(x[0])
    assert torch.equal(reg.penalty(), expected)
    assert reg.report() == report
    net(3 * x)
    assert not torch.equal(reg.penalty(), expected)


def test_penalty_under_vmap_is_refused_rather_than_that_of_another_pass():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net)
    x = batch(6, 4)
    net(x)
    with pytest.raises(RuntimeError, match=r"called under torch.vmap, where nothing is recorded"):
        torch.vmap(lambda sample: net(sample).sum() + reg.penalty())(x)


def test_a_pass_inside_grad_can_be_asked_for_its_penalty_afterwards():
    net = net_of(4, 5, 3)
    reg = ck.DREG(net, STRENGTH)
    x = batch(6, 4)
    net(x)
    expected = reg.penalty()
    net(2 * x)
    torch.func.grad(lambda values: net(values).sum())(x)
    assert torch.equal(reg.penalty(), expected)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "net"}, TypeError, "model: expected a torch.nn.Module, got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model: found no layer to regularise in a Linear, that is no"),
        ({"strength": "1"}, TypeError, "strength: expected a number, got str"),
        ({"strength": -1.0}, ValueError, "strength: expected a finite number of at least 0, got -1.0"),
        ({"strength": float("nan")}, ValueError, "strength: expected a finite number of at least 0, got nan"),
        ({"variant": "all"}, ValueError, "variant: expected one of layer, activation, accumulated, got 'all'"),
        ({"reduction": "mean"}, TypeError, "reduction: expected a chainzrule_kernels.Reduction, got str"),
        ({"probes": "exact"}, ValueError, "probes: expected 1"),
        ({"schedule": 0.5}, TypeError, "schedule: expected a function of the step, got float"),
    ],
)
def test_bad_input_names_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        ck.DREG(**{"model": net_of(2, 2, 2), **options})


def test_reduction_rejects_another_word():
    with pytest.raises(ValueError, match="units: expected 'mean' or 'sum', got 'max'"):
        ck.Reduction(units="max")


def test_a_second_regulariser_is_refused():
    net = net_of(2, 2, 2)
    ck.DREG(net)
    with pytest.raises(ValueError, match="its layer '0' has a DREG attached already"):
        ck.DREG(net)


def test_other_activations_are_named_rather_than_passed_over():
    model = nn.Sequential(ck.nn.PolynomialLinear(2, 2), nn.Linear(2, 2), nn.LeakyReLU())
    reg = ck.DREG(model)
    assert [row.name for row in reg.layers] == ["0"]
    ((name, module, reason),) = [(row.name, row.module, row.reason) for row in reg.skipped]
    assert (name, module) == ("2", "LeakyReLU")
    assert "not one of the activations relu" in reason

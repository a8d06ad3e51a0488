"""Schedules and diagnostics."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chainzrule_kernels as ck
from chainzrule_kernels import diagnostics


def test_schedules_hold_their_ends_and_their_curve():
    assert [ck.schedules.linear(1.0, 3.0, 4)(step) for step in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    cosine = ck.schedules.cosine(0.0, 1.0, 4)
    assert [cosine(step) for step in range(6)] == pytest.approx(
        [0.0, 0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125), 1.0, 1.0]
    )
    exponential = ck.schedules.exponential(1.0, 16.0, 4)
    assert [exponential(step) for step in range(6)] == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 16.0])
    assert [ck.schedules.constant(0.25)(step) for step in (0, 1, 100)] == [0.25] * 3


def test_warm_up_rises_and_then_goes_on():
    schedule = ck.schedules.warm_up(ck.schedules.linear(1.0, 0.0, 4), 2)
    assert [schedule(step) for step in range(8)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [ck.schedules.warm_up(lambda step: 4.0 + step, 4, start=2.0)(step) for step in range(6)] == [
        2.0,
        2.5,
        3.0,
        3.5,
        4.0,
        5.0,
    ]
    twice = ck.schedules.warm_up(ck.schedules.warm_up(ck.schedules.constant(1.0), 2, start=0.5), 2)
    assert [twice(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "schedule",
    [
        ck.schedules.constant(0.5),
        ck.schedules.linear(1.0, 0.0, 10),
        ck.schedules.cosine(1.0, 0.1, 10),
        ck.schedules.exponential(1.0, 0.01, 10),
        ck.schedules.warm_up(ck.schedules.cosine(1.0, 0.1, 6), 4),
    ],
    ids=lambda schedule: getattr(schedule, "shape", "warm-up"),
)
def test_a_run_that_is_resumed_from_a_checkpoint_goes_on_with_the_same_strengths(schedule, tmp_path):
    def attached():
        return ck.DREG(ck.nn.ChainzRuleNet((2, 3, 2)), schedule=schedule)

    reg, strengths = attached(), []
    for step in range(12):
        if step == 5:
            torch.save({"regulariser": reg.state_dict()}, tmp_path / "checkpoint.pt")
        strengths.append(reg.strength)
        reg.step()
    resumed = attached()
    # What torch.load does by default: nothing but tensors, numbers and containers of them.
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["regulariser"])
    for strength in strengths[5:]:
        assert resumed.strength == strength
        resumed.step()


def test_schedules_can_be_copied_and_stored():
    schedule = ck.schedules.warm_up(ck.schedules.cosine(1.0, 0.0, 10), 2)
    assert copy.deepcopy(schedule) == schedule
    assert pickle.loads(pickle.dumps(schedule))(3) == schedule(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ck.schedules.linear(1.0, 0.0, 0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: ck.schedules.linear(1.0, 0.0, 2.5), TypeError, "steps: expected an int, got float"),
        (lambda: ck.schedules.warm_up(0.5, 2), TypeError, "schedule: expected a function of the step, got float"),
        (lambda: ck.schedules.warm_up(ck.schedules.constant(), 0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: ck.schedules.warm_up(ck.schedules.constant(), 2, None), TypeError, "start: expected a number, got N"),
        (lambda: ck.schedules.linear("1", 0.0, 2), TypeError, "start: expected a number, got str"),
        (lambda: ck.schedules.cosine(0.0, math.inf, 2), ValueError, "end: expected a finite number, got inf"),
        (lambda: ck.schedules.exponential(1.0, 0.0, 2), ValueError, "start, end: expected positive numbers"),
    ],
)
def test_schedules_reject_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("count", [1, 2, 99, 100, 1000])
def test_percentile_is_that_of_torch(count):
    values = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    for percent in (0.0, 50.0, 99.0, 100.0):
        assert diagnostics.percentile(values, percent) == pytest.approx(
            values.quantile(percent / 100).item(), rel=1e-12
        )


@pytest.mark.parametrize(
    ("percent", "error", "message"),
    [
        (101.0, ValueError, "percent: expected 0 to 100, got 101.0"),
        (math.nan, ValueError, "percent: expected 0 to 100, got nan"),
        ("50", TypeError, "percent: expected a number, got str"),
    ],
)
def test_percentile_rejects_bad_input(percent, error, message):
    with pytest.raises(error, match=message):
        diagnostics.percentile([1.0, 2.0], percent)


def test_tail_ratio():
    assert ck.tail_ratio(torch.full((7, 3), 2.0)) == 1.0
    values = list(range(101))
    assert ck.tail_ratio(values) == pytest.approx(99 / 50)
    assert ck.tail_ratio(torch.tensor([float(value) for value in values], dtype=torch.float16)) == pytest.approx(
        99 / 50
    )
    assert math.isnan(ck.tail_ratio([0.0, 0.0]))
    assert math.isnan(ck.tail_ratio([1.0, math.nan]))


def test_peak_volatility():
    assert ck.peak_volatility([3.0, 3.0, 3.0]) == 1.0
    assert ck.peak_volatility([1.0, 2.0, 4.0, 10.0]) == pytest.approx(10 / 3)
    assert math.isnan(ck.peak_volatility(torch.zeros(3)))
    assert math.isnan(ck.peak_volatility([1.0, math.nan, 2.0]))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], ValueError, "expected at least one value"),
        ([1.0, -1.0], ValueError, "expected values of at least 0, got -1.0"),
        (["a"], TypeError, "expected a tensor or numbers, got list"),
        (None, TypeError, "expected a tensor or numbers, got NoneType"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "expected real numbers"),
    ],
)
def test_tail_and_peak_reject_bad_input(values, error, message):
    with pytest.raises(error, match=f"values: {message}"):
        ck.tail_ratio(values)
    with pytest.raises(error, match=f"history: {message}"):
        ck.peak_volatility(values)


def test_input_gradient_norms_are_those_of_each_sample_alone():
    model = nn.Linear(4, 3).double()
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    norms = diagnostics.input_gradient_norms(lambda x: F.cross_entropy(model(x), targets, reduction="none"), inputs)
    for sample, target, norm in zip(inputs, targets, norms, strict=True):
        sample = sample.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(sample), target), sample)
        torch.testing.assert_close(norm, gradient.norm())
    assert model.weight.grad is None
    with pytest.raises(ValueError, match=r"function: expected an output of shape \(6,\), got \(6, 3\)"):
        diagnostics.input_gradient_norms(model, inputs)


def test_loss_gradient_norms_are_those_of_each_sample_alone():
    model = ck.nn.ChainzRuleNet((4, 5, 3), noise=0.2, dtype=torch.float64)
    reg = ck.DREG(model)
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    model(inputs)
    penalty, report = reg.penalty(), reg.report()
    norms = diagnostics.loss_gradient_norms(model, F.cross_entropy, inputs, targets)
    assert torch.equal(reg.penalty(), penalty)  # the latest pass is still there
    assert reg.report() == report
    assert not norms.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    for index, norm in enumerate(norms):
        loss = F.cross_entropy(model(inputs[index : index + 1]), targets[index : index + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(norm, torch.cat([gradient.flatten() for gradient in gradients]).norm())


def test_table_prints_aligned_columns():
    model = ck.nn.ChainzRuleNet((2, 3, 3, 1))
    lines = str(ck.DREG(model).layers).splitlines()
    assert lines[0].split() == ["name", "module", "units", "penalises", "weight", "note"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["0", "PolynomialLinear", "3", "layer"],
        ["1", "PolynomialLinear", "3", "layer"],
    ]
    column = lines[0].index("penalises")
    assert all(line[column : column + 5] == "layer" for line in lines[1:])
    assert str(diagnostics.Table()) == "(no rows)"

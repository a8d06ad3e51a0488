"""The monitor: what it measures, and where that goes."""

from __future__ import annotations

import builtins
import csv
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn

import chainzrule_kernels as ck

COLUMNS = [field.name for field in fields(ck.Measurement)]


def net() -> ck.nn.ChainzRuleNet:
    torch.manual_seed(1)
    return ck.nn.ChainzRuleNet((4, 6, 5, 3), noise=0.3)


def batch() -> torch.Tensor:
    return torch.randn(32, 4, generator=torch.Generator().manual_seed(2))


def run(monitor: ck.JacobianMonitor, model: nn.Module, steps: int, with_inputs: bool = True) -> list[bool]:
    """Train for a few steps; whether each was measured."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    measured = []
    for _ in range(steps):
        loss = model(batch()).square().mean() + monitor.reg.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.reg.step()
        measured.append(monitor.step(*([batch()] if with_inputs else [])) is not None)
    return measured


def lines(path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_measures_when_due_what_the_report_says():
    model = net()
    reg = ck.DREG(model, schedule=ck.schedules.linear(1.0, 0.0, 10))
    monitor = ck.JacobianMonitor(reg, every=3)
    assert run(monitor, model, 7) == [False, False, True, False, False, True, False]
    assert [(row.step, row.layer) for row in monitor.history] == [(3, "0"), (3, "1"), (6, "0"), (6, "1")]
    rows = monitor.measure(batch())
    report = reg.report(batch())
    assert monitor.history[-2:] == list(rows)
    for row, expected in zip(rows, report, strict=True):
        assert (row.layer, row.mean, row.p99, row.tail_ratio, row.nonlinearity) == (
            expected.name,
            expected.mean,
            expected.p99,
            expected.tail_ratio,
            expected.nonlinearity,
        )
        assert (row.step, row.strength) == (7, reg.strength)
    assert monitor.history[0].strength == reg._base_strength * 0.7
    assert repr(monitor) == "JacobianMonitor(every=3, position=7, measurements=6)"


def test_a_step_that_is_not_due_runs_nothing():
    model = net()
    monitor = ck.JacobianMonitor(ck.DREG(model), every=100)
    calls = []
    model.register_forward_pre_hook(lambda *arguments: calls.append(arguments))
    for _ in range(99):
        assert monitor.step(batch()) is None
    assert calls == []
    assert monitor.step(batch()) is not None
    assert len(calls) == 1


def test_without_inputs_the_latest_pass_counts_and_nonlinearity_is_missing():
    model = net()
    monitor = ck.JacobianMonitor(ck.DREG(model), every=1)
    with pytest.raises(RuntimeError, match="no forward pass of the model has been recorded"):
        monitor.step()
    model(batch())
    assert [row.nonlinearity for row in monitor.step()] == [None, None]


def test_a_strength_of_zero_only_watches():
    model, plain = net(), net()
    monitor = ck.JacobianMonitor(ck.DREG(model, strength=0.0), every=1)
    run(monitor, model, 3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        plain(batch()).square().mean().backward()
        optimizer.step()
    for watched, unwatched in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(watched, unwatched)
    assert len(monitor.history) == 6
    assert all(row.mean > 0 and row.strength == 0 for row in monitor.history)


def test_the_measuring_pass_does_not_disturb_the_training():
    results = []
    for every in (1, 1000):
        model = net()
        monitor = ck.JacobianMonitor(ck.DREG(model), every=every)
        run(monitor, model, 3)
        assert all(module.training for module in model.modules())
        results.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# ---- the CSV file ----------------------------------------------------------------------------------------------------


def test_csv_has_a_header_and_every_measurement(tmp_path):
    path = tmp_path / "jacobians.csv"
    model = net()
    monitor = ck.JacobianMonitor(ck.DREG(model), every=2, csv=path)
    run(monitor, model, 2)
    assert len(lines(path)) == 3  # complete at any time
    run(monitor, model, 2, with_inputs=False)
    header, *rows = lines(path)
    assert header == COLUMNS
    for row, measurement in zip(rows, monitor.history, strict=True):
        expected = [getattr(measurement, name) for name in COLUMNS]
        assert row == ["" if value is None else str(value) for value in expected]
    assert rows[-1][COLUMNS.index("nonlinearity")] == ""


def test_csv_gets_its_folder_before_anything_is_measured(tmp_path):
    ck.JacobianMonitor(ck.DREG(net()), csv=tmp_path / "new" / "run" / "jacobians.csv")
    assert (tmp_path / "new" / "run").is_dir()


def test_csv_of_an_earlier_run_is_gone_on_with(tmp_path):
    path = tmp_path / "jacobians.csv"
    model = net()
    reg = ck.DREG(model)
    first = ck.JacobianMonitor(reg, every=2, csv=path)
    run(first, model, 4)
    second = ck.JacobianMonitor(reg, every=2, csv=str(path))
    assert second.history == first.history
    run(second, model, 2)
    assert [row[0] for row in lines(path)] == ["step", "2", "2", "4", "4", "6", "6"]


def test_csv_after_a_checkpoint_has_no_step_twice(tmp_path):
    path = tmp_path / "jacobians.csv"
    model = net()
    reg = ck.DREG(model)
    first = ck.JacobianMonitor(reg, every=2, csv=path)
    run(first, model, 4)
    checkpoint = first.state_dict()
    run(first, model, 4)  # lost with the process that ran it
    second = ck.JacobianMonitor(reg, every=2, csv=path)
    second.load_state_dict(checkpoint)
    assert second.state_dict() == {"position": 4}
    assert second.history == first.history[:4]
    run(second, model, 2)
    assert [row[0] for row in lines(path)] == ["step", "2", "2", "4", "4", "6", "6"]
    for state in ({"position": -1}, {"position": True}, {}, {"position": 1, "step": 1}):
        with pytest.raises(ValueError, match="state: expected the keys and values"):
            second.load_state_dict(state)
    with pytest.raises(TypeError, match=r"state: expected what JacobianMonitor.state_dict\(\) returns, got int"):
        second.load_state_dict(3)


def test_csv_line_that_a_process_did_not_finish_is_cut_off(tmp_path):
    path = tmp_path / "jacobians.csv"
    model = net()
    reg = ck.DREG(model)
    run(ck.JacobianMonitor(reg, every=1, csv=path), model, 2)
    whole = path.read_text()
    path.write_text(whole[:-7])
    monitor = ck.JacobianMonitor(reg, every=1, csv=path)
    assert [(row.step, row.layer) for row in monitor.history] == [(1, "0"), (1, "1"), (2, "0")]
    run(monitor, model, 1)
    assert [row[0] for row in lines(path)] == ["step", "1", "1", "2", "3", "3"]


@pytest.mark.parametrize("content", ["", "step,layer,mean,p99,tail_ratio,nonlinearity,strength\n"])
def test_csv_that_is_empty_gets_its_header_once(tmp_path, content):
    path = tmp_path / "jacobians.csv"
    path.write_text(content)
    model = net()
    run(ck.JacobianMonitor(ck.DREG(model), every=1, csv=path), model, 1)
    assert [row[0] for row in lines(path)] == ["step", "1", "1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch,loss\n1,0.5\n", "expected a file with the columns step,layer,.* has epoch,loss"),
        ("step,layer,mean,p99,tail_ratio,nonlinearity,strength\n1,0,x,1,1,,1\n", "a line that is no measurement"),
        ("step,layer,mean,p99,tail_ratio,nonlinearity,strength\n1,0\n", "a line that is no measurement"),
    ],
)
def test_csv_of_something_else_is_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "losses.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"csv: .*{message}"):
        ck.JacobianMonitor(ck.DREG(net()), csv=path)
    assert path.read_text() == content


# ---- console, TensorBoard, curves ------------------------------------------------------------------------------------


def test_console_prints_a_table_for_each_measurement(capsys):
    model = net()
    run(ck.JacobianMonitor(ck.DREG(model, 0.5), every=2, console=True), model, 4)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "step" in line] == [
        "Layer Jacobian norms at step 2, strength 0.5",
        "Layer Jacobian norms at step 4, strength 0.5",
    ]
    assert printed[1].split() == ["layer", "mean", "p99", "tail", "ratio", "nonlinearity"]
    assert printed[2].split()[0] == "0"
    model = net()
    run(ck.JacobianMonitor(ck.DREG(model), every=1), model, 1)
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_every_quantity(tmp_path):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the package tensorboard is not installed"
    )
    model = net()
    with ck.JacobianMonitor(ck.DREG(model), every=2, tensorboard=tmp_path) as monitor:
        run(monitor, model, 4)
    events = accumulators.EventAccumulator(str(tmp_path))
    events.Reload()
    quantities = ("mean", "p99", "tail_ratio", "nonlinearity")
    tags = {f"jacobian/{layer}/{quantity}" for layer in "01" for quantity in quantities}
    assert set(events.Tags()["scalars"]) == tags | {"jacobian/strength"}
    for row in monitor.history:
        for quantity in quantities:
            values = {event.step: event.value for event in events.Scalars(f"jacobian/{row.layer}/{quantity}")}
            assert values[row.step] == pytest.approx(getattr(row, quantity), rel=1e-6)


def test_tensorboard_writer_of_the_caller_stays_open():
    class Writer:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, tag, value, step):
            self.scalars.append((tag, value, step))

    model, writer = net(), Writer()
    with ck.JacobianMonitor(ck.DREG(model), every=1, tensorboard=writer) as monitor:
        run(monitor, model, 1, with_inputs=False)
    assert [scalar for scalar in writer.scalars if scalar[0] == "jacobian/0/mean"] == [
        ("jacobian/0/mean", monitor.history[0].mean, 1)
    ]
    assert "jacobian/0/nonlinearity" not in [scalar[0] for scalar in writer.scalars]


def without(monkeypatch, package: str) -> None:
    """As if a package were not installed."""
    genuine = builtins.__import__

    def imported(name, *rest):
        if name == package or name.startswith(f"{package}."):
            raise ImportError(f"No module named {name}")
        return genuine(name, *rest)

    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", imported)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    model = net()
    monitor = ck.JacobianMonitor(ck.DREG(model), every=1)
    run(monitor, model, 1)
    without(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match="needs the package matplotlib: pip install matplotlib"):
        monitor.plot(tmp_path / "jacobians.png")
    without(monkeypatch, "torch.utils.tensorboard")
    with pytest.raises(ImportError, match="needs the package tensorboard: pip install tensorboard"):
        ck.JacobianMonitor(monitor.reg, tensorboard=tmp_path)


def test_plot_draws_a_curve_for_each_layer_and_quantity(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="the package matplotlib is not installed")
    drawn = []
    genuine = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), genuine(self, *a, **k)))
    model = net()
    monitor = ck.JacobianMonitor(ck.DREG(model), every=1)
    with pytest.raises(ValueError, match="nothing has been measured yet"):
        monitor.plot(tmp_path / "empty.png")
    run(monitor, model, 3)
    path = monitor.plot(tmp_path / "jacobians.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    (figure,) = drawn
    for axis, quantity in zip(figure.axes, ("mean", "p99", "tail_ratio", "nonlinearity"), strict=True):
        for line, layer in zip(axis.get_lines(), "01", strict=True):
            rows = [row for row in monitor.history if row.layer == layer]
            assert list(line.get_xdata()) == [row.step for row in rows]
            assert list(line.get_ydata()) == [getattr(row, quantity) for row in rows]


def test_plot_names_every_layer_as_it_is_called(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="the package matplotlib is not installed")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    monitor = ck.JacobianMonitor(ck.DREG(net()))
    names = ["_private", "a $ and a $", "plain"]  # matplotlib leaves the first out, and sets the second as a formula
    monitor.history = [ck.Measurement(step, name, 1.0, 1.0, 1.0, 0.5, 1.0) for step in (1, 2) for name in names]
    monitor.plot(tmp_path / "jacobians.png")
    texts = drawn[0].legends[0].get_texts()
    assert [text.get_text() for text in texts] == names
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every: expected at least 1, got 0"),
        ({"every": 1.0}, TypeError, "every: expected an int, got float"),
        ({"console": "yes"}, TypeError, "console: expected True or False, got str"),
        ({"csv": 3}, TypeError, "csv: expected a path, got int"),
        ({"tensorboard": 3}, TypeError, "tensorboard: expected a path or a .*SummaryWriter, got int"),
        ({"reg": None}, TypeError, "reg: expected a chainzrule_kernels.DREG, got NoneType"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        ck.JacobianMonitor(**{"reg": ck.DREG(net()), **options})

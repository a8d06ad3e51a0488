"""The studies of depth, schedules and volatility: each command in quick, after a kill too, and its arithmetic."""

from __future__ import annotations

import gzip
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from studies import data, polykervnet_depth, schedules, volatility
from studies.networks import CHAINZRULE, network


@pytest.mark.parametrize(
    ("study", "names"),
    [
        (polykervnet_depth, ("polykervnet_depth",)),
        (schedules, ("schedules",)),
        (volatility, ("volatility", "parameters")),
    ],
    ids=lambda value: value.__name__.split(".")[-1] if isinstance(value, ModuleType) else "",
)
def test_a_quick_study_runs_and_goes_on_after_a_kill(study, names, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [study.__name__, "--quick", "--out", str(tmp_path)])
    study.main()
    first_report = capsys.readouterr().out
    files = [tmp_path / f"{name}.csv" for name in names]
    whole = [without_times(file) for file in files]
    assert all((tmp_path / f"{name}.png").stat().st_size > 0 for name in names)
    # What a process leaves that is killed while it writes the last run.
    for file in files:
        file.write_text(file.read_text()[:-10])
    study.main()
    assert [without_times(file) for file in files] == whole
    # The report has accuracies only, which do not depend on the time it took.
    assert capsys.readouterr().out == first_report


def without_times(file: Path) -> list[str]:
    """The lines of a store without the last two columns, which are times."""
    lines = file.read_text().splitlines()
    assert lines[0].endswith(",seconds,process_seconds")
    return [line.rsplit(",", 2)[0] for line in lines]


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules.SCHEDULES[1:])
def test_schedules_have_the_same_mean(name):
    values = [schedules.schedule(name, 50)(step) for step in range(50)]
    assert math.isclose(sum(values) / 50, 1.0, rel_tol=1e-12)
    if name == schedules.CONSTANT:
        assert len(set(values)) == 1
    else:
        assert values == sorted(values, reverse=name in schedules.FALLING)
        assert len(set(values)) == 50


@pytest.mark.parametrize("name", [schedules.NONE, "square, falling"])
def test_no_such_schedule(name):
    with pytest.raises(ValueError, match=rf"name: expected one of constant, .*, got '{name}'"):
        schedules.schedule(name, 50)


@pytest.mark.parametrize("activation", ["ReLU", CHAINZRULE])
def test_representation_noise_is_relative_and_leaves_the_first_layer_alone(activation):
    torch.manual_seed(0)
    model = network((8, 400, 400, 3), activation)
    layers = [layer for layer in model if hasattr(layer, "weight")]
    seen: list[torch.Tensor] = []
    for layer in layers:
        # In front of the noise's hooks, which are registered later, stands what the layer would have been given.
        layer.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0].detach()))
        layer.register_forward_hook(lambda layer, arguments, output: seen.append(arguments[0].detach()))
    x = torch.randn(500, 8)
    plain = model(x)
    seen.clear()
    with schedules.representation_noise(model, 0.5, 1):
        noisy = model(x)
        assert torch.equal(seen[0], seen[1])
        for clean, given in ((seen[2], seen[3]), (seen[4], seen[5])):
            # Of each sample. 200 000 draws: four standard errors of their standard deviation are 0.63 %.
            draws = (given - clean) / clean.square().mean(1, keepdim=True).sqrt()
            assert (draws.std() / 0.5 - 1).abs() < 0.0064
    with schedules.representation_noise(model, 0.5, 1):
        assert torch.equal(model(x), noisy)
    assert not torch.equal(plain, noisy)
    assert torch.equal(model(x), plain)


# ---- volatility and parameters --------------------------------------------------------------------------------------


def test_change_is_that_of_pairs():
    def row(method: str, layers: int, seed: int, value: float) -> dict[str, object]:
        return {"method": method, "hidden_layers": layers, "learning_rate": "cosine", "seed": seed, "max": value}

    rows = [row("ReLU", layers, seed, 2.0 + seed) for layers in (1, 3) for seed in range(4)]
    rows += [row(CHAINZRULE, 1, seed, 0.5 * (2.0 + seed)) for seed in range(4)]
    rows += [row(CHAINZRULE, 3, seed, 0.72 * (2.0 + seed)) for seed in range(4)]
    # The geometric mean of 0.5 and 0.72 is 0.6, for every seed.
    assert volatility.change(rows, "max", CHAINZRULE, "ReLU") == pytest.approx((-40.0, -40.0, -40.0))


def test_smallest_that_match():
    means = {
        ("ReLU", 1, 128): 0.98,
        ("ReLU", 1, 8): 0.972,
        ("tanh", 1, 4): 0.90,
        (CHAINZRULE, 1, 16): 0.98,
        (CHAINZRULE, 1, 4): 0.975,
    }
    parameters = {size: 100 * size[2] for size in means}
    best, ours = ("ReLU", 1, 128), (CHAINZRULE, 1, 16)
    assert volatility.matches(means, parameters, 0.0) == (best, best, ours)
    assert volatility.matches(means, parameters, 0.5) == (best, best, (CHAINZRULE, 1, 4))
    assert volatility.matches(means, parameters, 1.0) == (best, ("ReLU", 1, 8), (CHAINZRULE, 1, 4))
    del means[ours]
    assert volatility.matches(means, parameters, 0.0) == (best, best, None)


@pytest.mark.parametrize("is_packed", [False, True])
def test_mnist_from_its_files(tmp_path, is_packed):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part, count in (("train", 5), ("t10k", 2)):
        for kind, values in (("images-idx3", pictures[:count]), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
            name = f"{part}-{kind}-ubyte"
            if is_packed:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / name).write_bytes(content)
    parts = data.mnist(tmp_path)
    assert (parts.features, parts.classes) == (784, 5)
    assert parts.test_y.tolist() == [0, 1]
    expected = (pictures.astype(np.float64) - pictures.mean()) / pictures.std()
    torch.testing.assert_close(parts.train_x.double(), torch.from_numpy(expected.reshape(5, 784)), rtol=1e-5, atol=1e-5)
    assert torch.equal(parts.test_x, parts.train_x[:2])


def test_mnist_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        data.mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="is not an idx file of bytes; it begins with b'GIF'"):
        data.mnist(tmp_path)


# ---- depth ----------------------------------------------------------------------------------------------------------


def test_depth_tells_the_outcomes_apart(threads):
    torch.set_num_threads(1)
    images = polykervnet_depth.data.digits(8, 0)
    shared = polykervnet_depth.Shared("digits", width=4, batch=64, first_epochs=2)
    weights = polykervnet_depth.relu_weights(images, shared)
    relu, pkn = (
        row
        for row in polykervnet_depth.configurations(True)
        if row["kernel"] in ("relu", "pkn") and row["batch_norm"] == "no"
    )
    # From the weights of a net that has learned, at a rate of next to nothing.
    started = {**relu, "batch_norm": "yes", "start": polykervnet_depth.TRAINED, "learning_rate": 1e-12}
    learned = polykervnet_depth.run(started, images, shared, weights)
    assert learned["outcome"] == polykervnet_depth.TRAINS
    assert math.isnan(learned["diverged_at"])
    # From random ones it is guessing.
    guessed = polykervnet_depth.run({**started, "start": polykervnet_depth.RANDOM}, images, shared, weights)
    assert guessed["outcome"] == polykervnet_depth.DOES_NOT
    # Squares of squares, and no batch norm.
    diverged = polykervnet_depth.run(pkn, images, shared, weights)
    assert (diverged["outcome"], diverged["diverged_at"]) == (polykervnet_depth.DIVERGES, 1.0)
    assert math.isnan(diverged["test_accuracy"])

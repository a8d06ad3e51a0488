"""The ground that the studies stand on, and the studies of tabular data end to end at their smallest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from studies import command, data, measures, networks, penalties, pima, statistics, sweep, sweep_times, tail_ratio
from studies.store import Store
from studies.training import Settings, batches, train

KEYS = {"name": str, "seed": int, "fraction": float}
VALUES = {"accuracy": float}
PIMA_HEADER = ",".join((*data.PIMA_FEATURES, "outcome\n")).encode()


def make_store(folder: Path, **settings: float) -> Store:
    return Store(folder, "study", KEYS, VALUES, settings)


def configuration(seed: int) -> dict[str, object]:
    return {"name": "a, b", "seed": seed, "fraction": 0.1}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """As the commands run: networks this small only wait for a second one."""
    torch.set_num_threads(1)


@pytest.fixture
def pima_file(tmp_path: Path) -> Path:
    """Made-up data in the form of the Pima data, with missing values."""
    numbers = np.random.default_rng(0)
    outcome = numbers.random(200) < 0.35
    features = numbers.normal(20 + 5 * outcome[:, None], 5, (200, 8)).clip(1)
    features[:, 4] = np.where(numbers.random(200) < 0.3, 0, features[:, 4])
    path = tmp_path / "made-up.csv"
    header = ",".join((*data.PIMA_FEATURES, "outcome"))
    np.savetxt(path, np.column_stack([features, outcome]), delimiter=",", header=header, comments="", fmt="%.3f")
    return path


# ---- the store ------------------------------------------------------------------------------------------------------


def test_a_study_goes_on_where_it_was_interrupted(tmp_path):
    runs = [configuration(seed) for seed in range(5)]
    ran: list[int] = []
    interruptions = [KeyboardInterrupt()]

    def run(one):
        if one["seed"] == 3 and interruptions:
            raise interruptions.pop()
        ran.append(one["seed"])
        return {"accuracy": one["seed"] / 3}

    with pytest.raises(SystemExit, match="130"):
        command.run_missing("study", make_store(tmp_path), runs, run)
    store = make_store(tmp_path)
    command.run_missing("study", store, runs, run)
    assert ran == [0, 1, 2, 3, 4]
    assert store.rows == make_store(tmp_path).rows
    assert [row["accuracy"] for row in store.rows] == pytest.approx([seed / 3 for seed in range(5)], rel=1e-4)


def test_a_half_line_of_a_killed_process_is_run_again(tmp_path):
    store = make_store(tmp_path)
    for seed in range(2):
        store.add(configuration(seed), {"accuracy": 0.5})
    whole = store.path.read_text()
    store.path.write_text(whole[:-6])
    again = make_store(tmp_path)
    assert again.missing([configuration(0), configuration(1)]) == [configuration(1)]
    again.add(configuration(1), {"accuracy": 0.5})
    assert store.path.read_text() == whole


def test_a_store_keeps_what_is_not_a_number(tmp_path):
    make_store(tmp_path).add(configuration(0), {"accuracy": float("nan")})
    assert np.isnan(make_store(tmp_path).rows[0]["accuracy"])


def test_a_store_refuses_other_settings_columns_and_repetitions(tmp_path):
    store = make_store(tmp_path, steps=3)
    store.add(configuration(0), {"accuracy": 0.5})
    with pytest.raises(ValueError, match="has a run already"):
        store.add(configuration(0), {"accuracy": 0.6})
    with pytest.raises(ValueError, match="expected the columns"):
        store.add(configuration(1), {"loss": 0.6})
    with pytest.raises(ValueError, match="steps"):
        make_store(tmp_path, steps=4)
    with pytest.raises(ValueError, match="has the columns"):
        Store(tmp_path, "study", KEYS, {"loss": float}, {"steps": 3})


# ---- the data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_preprocessing_does_not_see_the_test_part(pima_file, fraction):
    dataset = data.load("Pima", pima_file)
    _, test = data.test_indices(dataset, 0)
    changed = dataset.x.copy()
    changed[test] = 1000 + 7 * changed[test]
    before = data.split(dataset, 0, fraction)
    after = data.split(data.Dataset("Pima", changed, dataset.y), 0, fraction)
    torch.testing.assert_close(before.train_x, after.train_x, rtol=0, atol=0)
    assert not torch.equal(before.test_x, after.test_x)
    # The protocol that leaks is one that does see it.
    leaking = [pima.protocol_parts(data.Dataset("Pima", x, dataset.y), pima.BEFORE, 0) for x in (dataset.x, changed)]
    assert not torch.equal(leaking[0].train_x, leaking[1].train_x)


def test_parts_are_disjoint_and_keep_the_shares_of_the_classes():
    dataset = data.load("wine")
    train_rows, test_rows = data.test_indices(dataset, 3)
    assert sorted([*train_rows, *test_rows]) == list(range(len(dataset.y)))
    few = data.fewer(train_rows, dataset.y, 0.1, 3)
    assert set(few) < set(train_rows)
    assert np.bincount(dataset.y[few]).tolist() == [5, 6, 4]
    assert (
        abs(np.bincount(dataset.y[test_rows]) / len(test_rows) - np.bincount(dataset.y) / len(dataset.y)).max() < 0.02
    )


def test_a_noisy_version_has_other_features_and_some_wrong_labels():
    dataset = data.load("digits")
    clean, noisy = data.split(dataset, 0), data.split(dataset, 0, noisy=True)
    assert torch.equal(clean.test_y, noisy.test_y)
    wrong = (clean.train_y != noisy.train_y).double().mean().item()
    # Four standard deviations of a share of 1437.
    assert abs(wrong - data.LABEL_NOISE) < 4 * (data.LABEL_NOISE * (1 - data.LABEL_NOISE) / 1437) ** 0.5
    assert (noisy.test_x - clean.test_x).std().item() == pytest.approx(data.FEATURE_NOISE, rel=0.02)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "expected the columns pregnancies"),
        (b"a,b\n1,2\n", "expected the columns pregnancies"),
        (b"\x89PNG\xff\xfe", "can't decode"),
        (PIMA_HEADER, "expected a line for each sample"),
        (PIMA_HEADER + b"1,2,3,4,5,6,7,8,yes\n", "yes"),
        (PIMA_HEADER + b"1,0\n2,1\n", "expected 9 numbers a line, got 2"),
        (PIMA_HEADER + b"1,2,3,4,5,6,7,8,2\n", "expected the outcomes 0 and 1"),
    ],
    ids=["empty", "columns", "picture", "no samples", "words", "few numbers", "outcomes"],
)
def test_a_file_that_is_not_the_pima_data_is_refused_in_one_line(content, what, tmp_path, capsys):
    path = tmp_path / "other.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=what):
        data.load("Pima", path)
    with pytest.raises(SystemExit, match="2"):
        tail_ratio.main(["--quick", "--data", str(path), "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert error.startswith(f"python -m studies.tail_ratio: error: data: {path}: ")
    assert len(error.splitlines()) == 1


def test_files_and_folders_that_cannot_be_used_are_refused_in_one_line(pima_file, tmp_path, capsys):
    for options in (["--data", str(tmp_path / "none.csv")], ["--data", str(pima_file), "--out", str(pima_file)]):
        with pytest.raises(SystemExit, match="2"):
            tail_ratio.main(["--quick", *options])
        error = capsys.readouterr().err
        assert error.startswith("python -m studies.tail_ratio: error: ")
        assert options[-1] in error
        assert len(error.splitlines()) == 1


def test_protocols_leak_what_they_say(pima_file):
    dataset = data.load("Pima", pima_file)
    copied = pima.protocol_parts(dataset, pima.COPIES, 0)
    distances = torch.cdist(copied.test_x.double(), copied.train_x.double())
    assert (distances.amin(1) == 0).sum() > 10
    labels = torch.cat([copied.train_y, copied.test_y])
    assert labels.bincount().tolist() == [int((dataset.y == 0).sum())] * 2
    whole = pima.protocol_parts(dataset, pima.COMPLETE, 0)
    assert len(whole.train_x) + len(whole.test_x) == (~np.isnan(dataset.x).any(1)).sum()
    by_class = pima.protocol_parts(dataset, pima.BY_CLASS, 0)
    train_rows, _ = data.test_indices(dataset, 0)
    missing = np.isnan(dataset.x[train_rows, 4])
    filled = [by_class.train_x[torch.tensor(missing) & (by_class.train_y == label), 4].unique() for label in (0, 1)]
    assert [len(values) for values in filled] == [1, 1]
    assert filled[0] != filled[1]


# ---- networks, penalties, training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", networks.ACTIVATIONS)
def test_dreg_in_plain_pytorch_is_dreg(activation):
    learners = [
        penalties.learner((5, 7, 6, 3), activation, regulariser, 0, strength=0.3)
        for regulariser in (penalties.DREG, penalties.DREG_PLAIN)
    ]
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.arange(11) % 3
    results = []
    for one in learners:
        one.model.double()
        loss = one.objective(x, y)
        assert loss.item() > F.cross_entropy(one.model(x), y).item()
        results.append([loss, *torch.autograd.grad(loss, list(one.model.parameters()))])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


def test_weight_decay_is_the_penalty_that_it_is_said_to_be():
    x, y = torch.randn(20, 5), torch.arange(20) % 3
    decayed = penalties.learner((5, 7, 3), "ReLU", "weight decay", 0, strength=0.2)
    train(decayed, x, y, Settings(steps=5, batch=20), 0)
    model = penalties.learner((5, 7, 3), "ReLU", penalties.NONE, 0).model

    def objective(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        squares = sum(parameter.square().sum() for parameter in model.parameters() if parameter.dim() > 1)
        return F.cross_entropy(model(inputs), targets) + 0.2 * squares

    train(penalties.Learner(model, objective), x, y, Settings(steps=5, batch=20), 0)
    for one, other in zip(decayed.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("activation", ["tanh", networks.CHAINZRULE])
@pytest.mark.parametrize("regulariser", [penalties.NONE, *penalties.REGULARISERS])
def test_every_regulariser_trains_and_repeats_itself(activation, regulariser):
    parts = data.split(data.load("wine"), 0)
    histories = []
    for _ in range(2):
        learner = penalties.learner((13, 8, 8, 3), activation, regulariser, 4)
        histories.append(train(learner, parts.train_x, parts.train_y, Settings(steps=60, learning_rate=1e-2), 4))
    assert torch.equal(histories[0].losses, histories[1].losses)
    assert histories[0].diverged_at is None
    assert histories[0].losses[-5:].mean() < 0.7 * histories[0].losses[:5].mean()
    assert measures.accuracy(learner.model, parts.test_x, parts.test_y) > 0.6
    assert not learner.model.training


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="regulariser: expected one of none, weight decay"):
        penalties.learner((2, 3, 2), "ReLU", "DREGS", 0)
    with pytest.raises(ValueError, match="activation: expected one of ReLU"):
        penalties.learner((2, 3, 2), "relu", penalties.NONE, 0)
    with pytest.raises(ValueError, match="name: expected one of digits"):
        data.load("iris")


def test_an_epoch_has_every_sample_once():
    chosen = list(batches(10, 3, 7, 0))
    assert [len(one) for one in chosen] == [3] * 7
    for epoch in (chosen[:3], chosen[3:6]):
        assert len(torch.cat(epoch).unique()) == 9
    assert [sorted(one.tolist()) for one in batches(4, 64, 2, 0)] == [[0, 1, 2, 3]] * 2


def test_divergence_is_found():
    learner = penalties.learner((2, 4, 2), "ReLU", penalties.NONE, 0)
    x = torch.zeros(6, 2)
    x[4] = float("inf")
    history = train(learner, x, torch.zeros(6, dtype=torch.int64), Settings(steps=6, batch=1), 0)
    assert history.diverged_at == [int(one) for one in batches(6, 1, 6, 0)].index(4)


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_an_interval_is_students():
    values = [0.71, 0.74, 0.78, 0.70, 0.77]
    found = statistics.interval(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    wider = statistics.interval(values, test_to_train=0.25)
    assert wider.half_width == pytest.approx(found.half_width * ((1 / 5 + 0.25) * 5) ** 0.5)


def test_comparisons_are_wilcoxons_with_holms_correction():
    # The smallest p of five pairs is 2 / 2^5.
    assert statistics.signed_rank([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]) == pytest.approx(2 / 2**5)
    assert statistics.signed_rank([1, 2], [1, 2]) == 1.0
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    found = statistics.compare([3.0, 4, 5, 6, 8], {"lower": [2.0, 2, 2, 2, 3], "alike": [3.0, 4, 5, 6, 8]})
    assert (found["lower"].difference, found["lower"].corrected) == pytest.approx((3.0, 2 * found["lower"].p))
    assert (found["alike"].difference, found["alike"].corrected) == (0.0, 1.0)


def test_ranks_are_friedmans():
    scores = {"best": [0.9, 0.8, 0.9, 0.7], "middle": [0.8, 0.8, 0.7, 0.6], "worst": [0.1, 0.2, 0.3, 0.1]}
    assert statistics.friedman({"a": [1, 2], "b": [1, 2], "c": [1, 2]}).p == 1.0
    found = statistics.friedman(scores)
    assert found.ranks == pytest.approx({"best": 1.125, "middle": 1.875, "worst": 3.0})
    assert found.p == pytest.approx(stats.friedmanchisquare(*scores.values()).pvalue)


def test_what_is_equal_but_for_rounding_is_a_tie():
    # Three seeds of 36 test samples, in five digits as the store keeps them: each method is right on 104 of 108.
    equal = {"a": [0.94444, 0.97222, 0.97222], "b": [0.97222, 1.0, 0.91667], "c": [1.0, 1.0, 0.88889]}
    means = {name: float(np.mean(values)) for name, values in equal.items()}
    assert len(set(means.values())) > 1
    assert statistics.friedman({name: [mean, mean] for name, mean in means.items()}).ranks == dict.fromkeys("abc", 2.0)
    assert statistics.signed_rank([means["a"]] * 6, [means["b"]] * 6) == 1.0
    # Differences of one, one and two samples: the signed ranks are 1.5, 1.5 and 3 whatever the fifth digit says.
    rounded = statistics.signed_rank([0.02778, 0.02777, 0.05556], [0.0, 0.05555, 0.0])
    assert rounded == pytest.approx(stats.wilcoxon([1.0, -1.0, 2.0]).pvalue)
    assert statistics.tied([0.3, 0.1, 0.2, 0.10001]).tolist() == [0.3, 0.1, 0.2, 0.1]


# ---- measures -------------------------------------------------------------------------------------------------------


def test_norms_are_those_of_the_jacobians():
    model = networks.network((4, 6, 3), "tanh").double()
    x = torch.randn(5, 4, dtype=torch.float64)
    whole = torch.stack([torch.func.jacrev(model)(sample) for sample in x])
    torch.testing.assert_close(measures.network_jacobian_norms(model, x), whole.flatten(1).norm(dim=1).float().double())
    layer = torch.stack([torch.func.jacrev(model[:2])(sample) for sample in x])
    torch.testing.assert_close(measures.layer_jacobian_squares(model, x, "layer"), layer.flatten(1).square().sum(1))


def test_tail_ratios_of_a_linear_network_are_one():
    model = networks.network((4, 6, 3), networks.CHAINZRULE)
    with torch.no_grad():
        model[0].coeffs.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    found = measures.tail_ratios(model, torch.randn(50, 4), torch.arange(50) % 3)
    for name in ("layer Jacobian", "layer Jacobian squared", "slopes", "network Jacobian"):
        assert found[name] == pytest.approx(1.0, rel=1e-6)
    assert found["loss"] > 1.01
    assert measures.nonlinearity(model, torch.randn(50, 4)) == pytest.approx(0.0, abs=1e-6)


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_pima_quick_runs_once(pima_file, tmp_path, capsys):
    arguments = ["--quick", "--data", str(pima_file), "--out", str(tmp_path)]
    pima.main(arguments)
    first, table = (tmp_path / "pima.csv").read_text(), capsys.readouterr().out
    pima.main(arguments)
    assert (tmp_path / "pima.csv").read_text() == first
    assert capsys.readouterr().out == table
    assert len(first.splitlines()) == 1 + 3 * 2 * 2 + 8 * 2 * 2 + 4 * 2
    pictures = {"pima_fractions.png", "pima_methods.png", "pima_protocols.png", "pima_tail_ratio.png"}
    assert pictures <= {path.name for path in tmp_path.iterdir()}


def test_sweep_quick_runs_and_ranks(tmp_path, capsys):
    sweep.main(["--quick", "--out", str(tmp_path)])
    assert "8 regularised runs" in capsys.readouterr().out
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 1 + 3 * 2 * 3


def test_gains_are_one_for_each_split():
    rows = [
        {"activation": activation, "regulariser": regulariser, "dataset": "wine", "version": "clean", "fraction": 1.0}
        | {"seed": seed, "accuracy": 0.5 + 0.1 * seed + gain * (regulariser != penalties.NONE)}
        for seed in (0, 1)
        for activation, gain in (("ReLU", 0.1), ("tanh", 0.3))
        for regulariser in (penalties.NONE, "dropout")
    ]
    assert sweep.gains(rows, "accuracy", "dropout") == pytest.approx([0.2, 0.2])
    assert sweep.gains(rows, "accuracy", "dropout", "tanh") == pytest.approx([0.3, 0.3])


def test_sweep_times_quick_times_every_way(pima_file, tmp_path):
    sweep_times.main(["--quick", "--data", str(pima_file), "--out", str(tmp_path)])
    store = Store(
        tmp_path, "sweep_times", sweep_times.KEYS, sweep_times.VALUES, sweep.shared(sweep.settings_of(quick=True))
    )
    ways = [row["way"] for row in store.rows]
    assert len(ways) == 3 * ways.count("fused") == 3 * ways.count("plain PyTorch") == 3 * (1 * 2 * 2 + 2)
    assert all(row["process_seconds"] > 0 for row in store.rows)
    assert (tmp_path / "sweep_times.png").exists()


def test_tail_ratio_quick_measures_every_candidate(pima_file, tmp_path, capsys):
    tail_ratio.main(["--quick", "--data", str(pima_file), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("| ReLU | 16 |") == printed.count("| ChainzRule, λ = 10^-0.5 | 16 |") == 2
    assert all(name in printed for name in pima.TAILS)
    assert (tmp_path / "tail_ratio.png").exists()


def test_the_full_sweep_is_960_runs():
    full = [one for one in sweep.configurations(quick=False) if one["fraction"] == 1.0]
    assert sum(one["regulariser"] != penalties.NONE for one in full) == 960
    assert sum(one["regulariser"] == penalties.NONE for one in full) == 160

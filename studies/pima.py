"""ChainzRule and DREG against other methods on the Pima diabetes data: python -m studies.pima

The papers' claims: 85.71 ± 2.01 % accuracy, a tail ratio of 1.01 to 1.02 where other networks have 1.07 to 1.09, and a
lead with little data. Width, learning rate and steps are chosen by cross-validation within the training part of the
first split, alike for all networks. Everything else is fixed beforehand.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from studies import command, data, measures, pictures, statistics
from studies.networks import CHAINZRULE
from studies.penalties import DREG, NONE, REGULARISERS, learner
from studies.store import Row
from studies.training import Clock, Settings, train

PAPER = (0.8571, 0.0201)
"""Accuracy on these data, mean and deviation, as the papers give it."""

CLASSICAL: dict[str, Callable[[], Any]] = {
    "logistic regression": lambda: LogisticRegression(max_iter=1000),
    "SVM": lambda: SVC(),
    "gradient boosting": lambda: GradientBoostingClassifier(random_state=0),
}
NETWORKS = ("ReLU", "GELU", "tanh")
METHODS = (
    (CHAINZRULE, DREG),
    (CHAINZRULE, NONE),
    *((activation, regulariser) for activation in NETWORKS for regulariser in (NONE, *REGULARISERS)),
    *((name, NONE) for name in CLASSICAL),
)
OURS = METHODS[0]
FRACTIONS = (0.05, 0.1, 0.25, 0.5, 1.0)
SPLITS = 20

HONEST = "as it should be"
BEFORE = "median and scaling over all rows, before the split"
BY_CLASS = "missing values by the median of their class, before the split"
COPIES = "rarer class duplicated before the split"
COMPLETE = "rows with missing values left out"
BEST_STEP = "best moment chosen on the test part"
BEST_SEED = "best of 5 seeds chosen on the test part"
TOGETHER = "before the split, best moment, best of 5 seeds"
BY_CLASS_TOGETHER = "the same, best moment, best of 5 seeds"
PROTOCOLS = (HONEST, BEFORE, COMPLETE, COPIES, BEST_STEP, BEST_SEED, TOGETHER, BY_CLASS, BY_CLASS_TOGETHER)
CHOOSES = (BEST_STEP, BEST_SEED, TOGETHER, BY_CLASS_TOGETHER)
"""Protocols that choose among the moments or seeds of a training."""
PROTOCOL_METHODS = (OURS, ("ReLU", NONE), ("gradient boosting", NONE))
SEEDS = 5
LOOK_EVERY = 10
"""Steps between two looks at the test part, where a protocol takes the best."""

TAILS = (
    "layer Jacobian",
    "layer Jacobian squared",
    "slopes",
    "network Jacobian",
    "input gradient",
    "loss gradient",
    "loss",
    "confidence",
)
KEYS = {"protocol": str, "model": str, "regulariser": str, "fraction": float, "split": int}
VALUES = {
    "accuracy": float,
    "auc": float,
    **dict.fromkeys((f"tail ratio: {name}" for name in TAILS), float),
    "nonlinearity": float,
    "seconds": float,
    "process_seconds": float,
}

# ---- the choice of width, learning rate and steps -------------------------------------------------------------------

FOLDS = 5
CHOICES = [
    {"width": width, "learning_rate": rate, "steps": steps}
    for width in (16, 64)
    for rate in (1e-3, 3e-3)
    for steps in (100, 300, 600)
]
QUICK_CHOICES = [{"width": 8, "learning_rate": 3e-3, "steps": 20}]


def choose(pima: data.Dataset, arguments: argparse.Namespace) -> Row:
    """The choice with the best mean accuracy of ReLU and ChainzRule over folds of the first split's training part."""
    keys = {"width": int, "learning_rate": float, "steps": int, "model": str, "fold": int}
    choices = QUICK_CHOICES if arguments.quick else CHOICES
    configurations = [
        {**choice, "model": model, "fold": fold}
        for choice in choices
        for model in ("ReLU", CHAINZRULE)
        for fold in range(FOLDS)
    ]
    training, _ = data.test_indices(pima, 0)
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(training, pima.y[training]))

    def run(configuration: Row) -> Row:
        kept, left = (training[part] for part in folds[configuration["fold"]])
        prepare = data.preprocessing().fit(pima.x[kept])
        parts = data.as_parts(
            prepare.transform(pima.x[kept]), pima.y[kept], prepare.transform(pima.x[left]), pima.y[left], pima.classes
        )
        net = network(parts, configuration["model"], NONE, configuration, configuration["fold"])
        return {"accuracy": measures.accuracy(net, parts.test_x, parts.test_y)}

    columns = keys, {"accuracy": float}
    rows = command.rows(arguments, "pima_choice", columns, {"folds": FOLDS}, configurations, run)
    means = [np.mean([row["accuracy"] for row in rows if _agrees(row, choice)]) for choice in choices]
    return choices[int(np.argmax(means))]


def _agrees(row: Row, choice: Row) -> bool:
    return all(row[name] == value for name, value in choice.items())


def network(
    parts: data.Parts,
    activation: str,
    regulariser: str,
    choice: Row,
    seed: int,
    after_step: Callable[[Any, int], None] | None = None,
) -> Any:
    """A trained network of two hidden layers."""
    student = learner((parts.features, choice["width"], choice["width"], parts.classes), activation, regulariser, seed)
    settings = Settings(steps=choice["steps"], learning_rate=choice["learning_rate"])
    look = None if after_step is None else lambda step: after_step(student.model, step)
    train(student, parts.train_x, parts.train_y, settings, seed, look)
    return student.model


# ---- the runs -------------------------------------------------------------------------------------------------------


def configurations(quick: bool) -> list[Row]:
    """All runs: methods by fractions by splits as it should be, and the other protocols on all training data."""
    methods = (OURS, ("ReLU", NONE), ("gradient boosting", NONE)) if quick else METHODS
    fractions = (0.25, 1.0) if quick else FRACTIONS
    splits = range(2 if quick else SPLITS)

    def row(protocol: str, method: tuple[str, str], fraction: float, split: int) -> Row:
        return dict(zip(KEYS, (protocol, *method, fraction, split), strict=True))

    runs = [row(HONEST, method, f, split) for split in splits for method in methods for f in fractions]
    others = [
        row(protocol, method, 1.0, split)
        for split in splits
        for protocol in PROTOCOLS[1:]
        for method in PROTOCOL_METHODS
        if not (protocol in CHOOSES and method[0] in CLASSICAL)
    ]
    return runs + others


def run(pima: data.Dataset, configuration: Row, choice: Row) -> Row:
    """One run."""
    protocol, model, split = configuration["protocol"], configuration["model"], configuration["split"]
    parts = protocol_parts(pima, protocol, split, configuration["fraction"])
    if model in CLASSICAL:
        return classical(parts, model)
    clock = Clock()
    seeds = SEEDS if protocol in (BEST_SEED, TOGETHER, BY_CLASS_TOGETHER) else 1
    accuracies: list[float] = []
    for seed in range(seeds):

        def look(net: Any, step: int) -> None:
            if protocol in (BEST_STEP, TOGETHER, BY_CLASS_TOGETHER) and step % LOOK_EVERY == 0:
                accuracies.append(measures.accuracy(net, parts.test_x, parts.test_y))

        net = network(parts, model, configuration["regulariser"], choice, 1000 * split + seed, look)
        accuracies.append(measures.accuracy(net, parts.test_x, parts.test_y))
    times = clock.read()
    values = dict.fromkeys(VALUES, math.nan)
    if protocol == HONEST:
        tails = measures.tail_ratios(net, parts.test_x, parts.test_y)
        values |= {f"tail ratio: {name}": tails[name] for name in TAILS}
        values["nonlinearity"] = measures.nonlinearity(net, parts.test_x)
    probability = measures.probabilities(net, parts.test_x)
    auc = measures.area_under_curve(probability, parts.test_y.numpy())
    return {**values, **times, "accuracy": max(accuracies), "auc": auc}


def classical(parts: data.Parts, name: str) -> Row:
    """A run of a method of scikit-learn, with its default settings."""
    clock = Clock()
    fitted = CLASSICAL[name]().fit(parts.train_x.numpy(), parts.train_y.numpy())
    times = clock.read()
    x, y = parts.test_x.numpy(), parts.test_y.numpy()
    score = fitted.decision_function(x)
    values = {"accuracy": float(fitted.score(x, y)), "auc": float(roc_auc_score(y, score))}
    return {**dict.fromkeys(VALUES, math.nan), **times, **values}


def protocol_parts(pima: data.Dataset, protocol: str, split: int, fraction: float = 1.0) -> data.Parts:
    """Training and test part, as a protocol makes them."""
    x, y = pima.x, pima.y
    if protocol in (BEFORE, TOGETHER):
        x = data.preprocessing().fit_transform(x)
    elif protocol in (BY_CLASS, BY_CLASS_TOGETHER):
        x = x.copy()
        for label in np.unique(y):
            medians = np.nanmedian(x[y == label], axis=0)
            x[y == label] = np.where(np.isnan(x[y == label]), medians, x[y == label])
    elif protocol == COPIES:
        rarer = np.flatnonzero(y == np.argmin(np.bincount(y)))
        copies = np.random.default_rng(split).choice(rarer, len(y) - 2 * len(rarer))
        x, y = np.concatenate([x, x[copies]]), np.concatenate([y, y[copies]])
    elif protocol == COMPLETE:
        whole = ~np.isnan(x).any(axis=1)
        x, y = x[whole], y[whole]
    return data.split(data.Dataset(pima.name, x, y), split, fraction)


# ---- what came out --------------------------------------------------------------------------------------------------


def label(model: str, regulariser: str) -> str:
    """How a method is called."""
    return model if regulariser == NONE else f"{model}, {regulariser}"


def values_of(rows: Sequence[Row], column: str, method: tuple[str, str], **wanted: Any) -> list[float]:
    """A column of a method's runs, in the order of the splits."""
    wanted = {"protocol": HONEST, "model": method[0], "regulariser": method[1], **wanted}
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row[column] for row in sorted(chosen, key=lambda row: row["split"])]


def spread_of(values: Sequence[float]) -> statistics.Interval:
    """The interval of a mean over the splits, as wide as for splits that keep all of their training part.

    With less of it the splits share fewer training samples, so that the interval is rather too wide than too narrow.
    """
    return statistics.interval(values, test_to_train=data.TEST_SHARE / (1 - data.TEST_SHARE))


def report(rows: Sequence[Row], out: Path) -> None:
    """Print the tables and draw the pictures."""
    methods = list(dict.fromkeys((row["model"], row["regulariser"]) for row in rows if row["protocol"] == HONEST))
    fractions = sorted({row["fraction"] for row in rows})
    spread = {
        (method, fraction): spread_of(values_of(rows, "accuracy", method, fraction=fraction))
        for method in methods
        for fraction in fractions
    }
    ranked = sorted(methods, key=lambda method: -spread[method, 1.0].mean)
    _report_accuracy(rows, ranked, fractions, spread)
    _report_tails(rows, ranked, out)
    _report_protocols(rows, out)
    _draw_accuracy(out, ranked, fractions, spread)


def _report_accuracy(rows: Sequence[Row], ranked: Any, fractions: Sequence[float], spread: Any) -> None:
    lines = []
    comparisons = {
        fraction: statistics.compare(
            values_of(rows, "accuracy", OURS, fraction=fraction),
            {
                label(*method): values_of(rows, "accuracy", method, fraction=fraction)
                for method in ranked
                if method != OURS
            },
        )
        for fraction in fractions
    }
    for method in ranked:
        auc = spread_of(values_of(rows, "auc", method, fraction=1.0))
        comparison = comparisons[1.0].get(label(*method))
        lines.append(
            [
                label(*method),
                *(spread[method, fraction].percent() for fraction in fractions),
                str(auc),
                "" if comparison is None else f"{100 * comparison.difference:+.1f}",
                "" if comparison is None else f"{comparison.corrected:.2g}",
            ]
        )
    shares = [f"{fraction:.0%}" for fraction in fractions]
    command.print_table(
        "Accuracy in percent by the share of the training data, and at all of it the area under the curve and what "
        f"{label(*OURS)} is ahead, with Wilcoxon's p after Holm's correction",
        ("method", *shares, "AUC", "ahead", "p"),
        lines,
    )
    lines = []
    for fraction in fractions:
        found = {name: one for name, one in comparisons[fraction].items() if one.corrected < 0.05}
        better = [name for name, one in found.items() if one.difference > 0]
        worse = [name for name, one in found.items() if one.difference < 0]
        lines.append([f"{fraction:.0%}", ", ".join(better) or "none", ", ".join(worse) or "none"])
    command.print_table(
        f"Where {label(*OURS)} differs, corrected p below 0.05", ("training data", "better than", "worse than"), lines
    )


def _report_tails(rows: Sequence[Row], ranked: Any, out: Path) -> None:
    nets = [method for method in ranked if method[0] not in CLASSICAL]
    columns = (*(f"tail ratio: {name}" for name in TAILS), "nonlinearity")
    means = {
        label(*method): {
            column.removeprefix("tail ratio: "): statistics.interval(values_of(rows, column, method, fraction=1.0)).mean
            for column in columns
        }
        for method in nets
    }
    command.print_table(
        "p99 / mean over the samples of the test part, all training data, mean of the splits",
        ("network", *next(iter(means.values()))),
        [[name, *(f"{value:.3f}" for value in line.values())] for name, line in means.items()],
    )
    by_fraction, of_means = [], []
    for fraction in sorted({row["fraction"] for row in rows}):
        line, line_of_means = [f"{fraction:.0%}"], [f"{fraction:.0%}"]
        for column in columns:
            signs = [_rank_correlation(rows, nets, column, fraction, split) for split in {row["split"] for row in rows}]
            line.append(f"{np.nanmean(signs):+.2f}")
            pair = (
                [float(np.mean(values_of(rows, name, method, fraction=fraction))) for method in nets]
                for name in (column, "accuracy")
            )
            line_of_means.append(f"{statistics.rank_correlation(*pair):+.2f}")
        by_fraction.append(line)
        of_means.append(line_of_means)
    for what, lines in (("mean of the splits", by_fraction), ("of the means over the splits", of_means)):
        command.print_table(
            f"Spearman's correlation with the accuracy over the networks, {what}",
            ("training data", *next(iter(means.values()))),
            lines,
        )
    over_splits = []
    for method in ranked:
        accuracies = values_of(rows, "accuracy", method, fraction=1.0)
        over_splits.append([label(*method), f"{np.percentile(accuracies, 99) / np.mean(accuracies):.3f}"])
    command.print_table("p99 / mean over the splits, of the accuracy", ("method", "ratio"), over_splits)
    with pictures.figure(
        out / "pima_tail_ratio.png", "Pima: tail ratio p99 / mean over the test part", size=(10, 8)
    ) as axes:
        pictures.draw_grid(axes, means, digits=2)


def _rank_correlation(
    rows: Sequence[Row], nets: Sequence[tuple[str, str]], column: str, fraction: float, split: int
) -> float:
    chosen = [
        row
        for row in rows
        if (row["protocol"], row["fraction"], row["split"]) == (HONEST, fraction, split)
        and (row["model"], row["regulariser"]) in nets
    ]
    return statistics.rank_correlation([row[column] for row in chosen], [row["accuracy"] for row in chosen])


def _report_protocols(rows: Sequence[Row], out: Path) -> None:
    found = {
        (protocol, method): values_of(rows, "accuracy", method, fraction=1.0, protocol=protocol)
        for protocol in PROTOCOLS
        for method in PROTOCOL_METHODS
    }
    spread = {key: statistics.interval(values) for key, values in found.items() if values}

    def cell(protocol: str, method: tuple[str, str]) -> str:
        one = spread.get((protocol, method))
        return "" if one is None else f"{100 * one.mean:.2f} ± {100 * one.deviation:.2f}"

    command.print_table(
        "Accuracy in percent by protocol, all training data, mean ± standard deviation over the splits",
        ("protocol", *(label(*method) for method in PROTOCOL_METHODS)),
        [[protocol, *(cell(protocol, method) for method in PROTOCOL_METHODS)] for protocol in PROTOCOLS],
    )
    title = "Pima: accuracy by protocol, mean and standard deviation over the splits"
    with pictures.figure(out / "pima_protocols.png", title, size=(10, 4.5)) as axes:
        for position, method in enumerate(PROTOCOL_METHODS):
            shown = [protocol for protocol in PROTOCOLS if (protocol, method) in spread]
            axes.errorbar(
                [100 * spread[protocol, method].mean for protocol in shown],
                [-PROTOCOLS.index(protocol) - 0.2 * (position - 1) for protocol in shown],
                xerr=[100 * spread[protocol, method].deviation for protocol in shown],
                label=label(*method),
                color=pictures.COLOURS[position],
                marker=pictures.MARKERS[position],
                linestyle="none",
                capsize=2,
            )
        axes.axvspan(100 * (PAPER[0] - PAPER[1]), 100 * (PAPER[0] + PAPER[1]), color="black", alpha=0.12)
        axes.axvline(100 * PAPER[0], color="black", linestyle="--", linewidth=1, label="the paper's figure")
        axes.set_yticks([-position for position in range(len(PROTOCOLS))], PROTOCOLS)
        axes.set(xlabel="accuracy, %")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_accuracy(out: Path, ranked: Any, fractions: Sequence[float], spread: Any) -> None:
    shown = [
        method
        for method in (OURS, (CHAINZRULE, NONE), ("ReLU", NONE), ("ReLU", DREG), *((name, NONE) for name in CLASSICAL))
        if method in ranked
    ]
    with pictures.figure(out / "pima_fractions.png", "Pima: accuracy with little data, 95 % intervals") as axes:
        series = {}
        for position, method in enumerate(shown):
            found = [spread[method, fraction] for fraction in fractions]
            # Beside one another, not on one another.
            places = [100 * fraction * 1.025 ** (position - len(shown) / 2) for fraction in fractions]
            series[label(*method)] = (
                places,
                [100 * one.mean for one in found],
                [100 * one.half_width for one in found],
            )
        pictures.draw_lines(axes, series, xscale="log", xlabel="training data, %", ylabel="accuracy, %")
        axes.set_xticks([100 * fraction for fraction in fractions], [f"{100 * fraction:g}" for fraction in fractions])
        axes.minorticks_off()
    with pictures.figure(
        out / "pima_methods.png", "Pima: accuracy with all training data, 95 % intervals", size=(8, 7)
    ) as axes:
        bars = {
            label(*method): (100 * spread[method, 1.0].mean, 100 * spread[method, 1.0].half_width) for method in ranked
        }
        own = [label(*method) for method in ranked if method[0] == CHAINZRULE]
        pictures.draw_bars(axes, bars, own, xlabel="accuracy, %", xlim=(70, 88))
        axes.axvline(100 * PAPER[0], color="black", linestyle="--", linewidth=1)
        axes.text(100 * PAPER[0] - 0.2, 0, "the paper's figure", ha="right", va="center")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    arguments = command.parser("pima", __doc__, reads_pima=True).parse_args(argv)
    out = command.folder(arguments)
    with command.refusing(arguments):
        pima = data.load("Pima", arguments.data)
    choice = choose(pima, arguments)
    print(f"chosen within the training part of the first split: {choice}")
    runs, shared = configurations(arguments.quick), {**choice, "seeds": SEEDS, "look_every": LOOK_EVERY}
    report(command.rows(arguments, "pima", (KEYS, VALUES), shared, runs, lambda one: run(pima, one, choice)), out)
    print(f"\nResults and pictures: {out}")


if __name__ == "__main__":
    main()

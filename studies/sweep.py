"""Four activations, six regularisers, eight data sets, five seeds, at one strength: python -m studies.sweep

The sweep of arXiv 2606.23942 in small: 960 runs at λ = 10^-2.5, and 160 without a regulariser to compare with. Beside
it the same on a tenth of the training data. Width, learning rate and steps were fixed beforehand, alike for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from studies import command, data, measures, pictures, statistics
from studies.networks import CHAINZRULE
from studies.penalties import DREG, NONE, REGULARISERS, STRENGTH, learner
from studies.store import Row
from studies.training import Settings, train

ACTIVATIONS = ("ReLU", "GELU", "tanh", CHAINZRULE)
VERSIONS = ("clean", "noisy")
SEEDS = 5
LITTLE = 0.1
NOISES = (0.25, 0.5, 1.0)
WIDTH = 64
SETTINGS = Settings(steps=400, batch=64, learning_rate=3e-3)
QUICK_SETTINGS = Settings(steps=20, batch=64, learning_rate=3e-3)

KEYS = {"activation": str, "regulariser": str, "dataset": str, "version": str, "fraction": float, "seed": int}
VALUES = {
    "accuracy": float,
    "auc": float,
    **{f"accuracy, noise {noise}": float for noise in NOISES},
    "tail_ratio": float,
    "nonlinearity": float,
    "diverged_at": float,
    "seconds": float,
    "process_seconds": float,
}


def configurations(quick: bool) -> list[Row]:
    """All runs; those on little data are made of the clean versions only."""
    activations = ("ReLU", CHAINZRULE) if quick else ACTIVATIONS
    regularisers = (NONE, "dropout", DREG) if quick else (NONE, *REGULARISERS)
    datasets = ("wine",) if quick else data.NAMES
    seeds = range(1 if quick else SEEDS)
    versions = [*((version, 1.0) for version in VERSIONS), ("clean", LITTLE)]
    return [
        dict(zip(KEYS, (activation, regulariser, dataset, version, fraction, seed), strict=True))
        for (version, fraction), seed, dataset, activation, regulariser in itertools.product(
            versions, seeds, datasets, activations, regularisers
        )
    ]


def run(datasets: Mapping[str, data.Dataset], configuration: Row, settings: Settings) -> Row:
    """One run."""
    seed = configuration["seed"]
    dataset = datasets[configuration["dataset"]]
    parts = data.split(dataset, seed, configuration["fraction"], configuration["version"] == "noisy")
    sizes = (parts.features, WIDTH, WIDTH, parts.classes)
    student = learner(sizes, configuration["activation"], configuration["regulariser"], seed)
    history = train(student, parts.train_x, parts.train_y, settings, seed)
    model, x, y = student.model, parts.test_x, parts.test_y
    values = {
        "accuracy": measures.accuracy(model, x, y),
        "auc": measures.area_under_curve(measures.probabilities(model, x), y.numpy()),
        "tail_ratio": measures.tail_ratio_of_layers(model, x),
        "nonlinearity": measures.nonlinearity(model, x),
        "diverged_at": math.nan if history.diverged_at is None else float(history.diverged_at),
        "seconds": history.seconds,
        "process_seconds": history.process_seconds,
    }
    return values | {f"accuracy, noise {n}": measures.noisy_accuracy(model, x, y, n, seed) for n in NOISES}


# ---- what came out --------------------------------------------------------------------------------------------------


def scores(rows: Sequence[Row], column: str, by: str, name: str, within: Sequence[str]) -> dict[tuple[str, ...], float]:
    """For each block, which agrees in the columns ``within``, the mean of a column where ``by`` is ``name``."""
    blocks: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row[by] == name:
            blocks.setdefault(tuple(row[other] for other in within), []).append(row[column])
    return {block: float(np.mean(values)) for block, values in blocks.items()}


def ranking(rows: Sequence[Row], column: str, by: str, within: Sequence[str]) -> statistics.Ranking:
    """Mean ranks of what the column ``by`` distinguishes, over blocks that agree in the columns ``within``."""
    names = list(dict.fromkeys(row[by] for row in rows))
    return statistics.friedman({name: list(scores(rows, column, by, name, within).values()) for name in names})


def gains(rows: Sequence[Row], column: str, regulariser: str, activation: str | None = None) -> list[float]:
    """What a regulariser adds to a column, for each data set, version and seed: the mean over the activations.

    The activations of a seed share its split, so that their gains are not independent.
    """
    within = [name for name in KEYS if name not in ("regulariser", "activation")]
    chosen = [row for row in rows if activation in (None, row["activation"])]
    its, without = (scores(chosen, column, "regulariser", name, within) for name in (regulariser, NONE))
    return [its[block] - without[block] for block in its]


def report(rows: Sequence[Row], out: Path) -> None:
    """Print the tables and draw the pictures."""
    full = [row for row in rows if row["fraction"] == 1.0]
    little = [row for row in rows if row["fraction"] == LITTLE]
    clean = [row for row in full if row["version"] == "clean"]
    regularisers = list(dict.fromkeys(row["regulariser"] for row in rows))
    activations = list(dict.fromkeys(row["activation"] for row in rows))
    _report_total(full)
    _report_ranks(full, clean, little, regularisers)
    _report_activations(full, activations, regularisers, out)
    _report_noise(clean, regularisers, out)
    _report_little(clean, little, activations, regularisers, out)


def _report_total(full: Sequence[Row]) -> None:
    counted = [row for row in full if row["regulariser"] != NONE]
    seconds = sum(row["process_seconds"] for row in counted)
    diverged = sum(not math.isnan(row["diverged_at"]) for row in full)
    print(f"\n{len(counted)} regularised runs: {seconds / 60:.1f} minutes of training on one thread, process time")
    print(f"{diverged} of {len(full)} runs reached a loss that is not finite")


def _report_ranks(
    full: Sequence[Row], clean: Sequence[Row], little: Sequence[Row], regularisers: Sequence[str]
) -> None:
    within = ("dataset", "version", "activation")
    rankings = {
        "clean and noisy": ranking(full, "accuracy", "regulariser", within),
        "clean": ranking(clean, "accuracy", "regulariser", within),
        "AUC": ranking(full, "auc", "regulariser", within),
        **{
            f"test noise {noise}": ranking(clean, f"accuracy, noise {noise}", "regulariser", within) for noise in NOISES
        },
        f"{LITTLE:.0%} of the data": ranking(little, "accuracy", "regulariser", within),
    }
    command.print_table(
        "Mean rank of the accuracy over data sets and activations, 1 the best; p of Friedman's test",
        ("regulariser", *rankings),
        [
            *(
                [name, *(f"{one.ranks[name]:.2f}" for one in rankings.values())]
                for name in sorted(regularisers, key=lambda name: rankings["clean and noisy"].ranks[name])
            ),
            ["p", *(f"{one.p:.2g}" for one in rankings.values())],
        ],
    )
    by_activation = {
        name: ranking([row for row in full if row["activation"] == name], "accuracy", "regulariser", within[:2])
        for name in dict.fromkeys(row["activation"] for row in full)
    }
    command.print_table(
        "Mean rank of the accuracy by activation, over data sets, clean and noisy",
        ("regulariser", *by_activation),
        [
            *([name, *(f"{one.ranks[name]:.2f}" for one in by_activation.values())] for name in regularisers),
            ["p", *(f"{one.p:.2g}" for one in by_activation.values())],
        ],
    )
    compared = {}
    for name, chosen, blocks in (
        ("all training data", full, within),
        # The activations share data sets and splits; this takes the data sets for the blocks, as the paper does.
        ("over the data sets", full, within[:2]),
        (f"{LITTLE:.0%} of the data", little, within),
    ):
        of = {one: scores(chosen, "accuracy", "regulariser", one, blocks) for one in regularisers}
        others = {one: list(values.values()) for one, values in of.items() if one != DREG}
        compared[name] = statistics.compare(list(of[DREG].values()), others)
    command.print_table(
        "What DREG is ahead in accuracy, in points, and Wilcoxon's p over data sets and activations, Holm-corrected",
        ("against", *(f"{name}{what}" for name in compared for what in ("", ", p"))),
        [
            [
                name,
                *itertools.chain.from_iterable(
                    (f"{100 * one[name].difference:+.2f}", f"{one[name].corrected:.2g}") for one in compared.values()
                ),
            ]
            for name in regularisers
            if name != DREG
        ],
    )


def _report_activations(
    full: Sequence[Row], activations: Sequence[str], regularisers: Sequence[str], out: Path
) -> None:
    def mean(activation: str, regulariser: str, column: str) -> float:
        chosen = [row for row in full if (row["activation"], row["regulariser"]) == (activation, regulariser)]
        return float(np.mean([row[column] for row in chosen]))

    grid = {
        regulariser: {activation: 100 * mean(activation, regulariser, "accuracy") for activation in activations}
        for regulariser in regularisers
    }
    ranks = ranking(full, "accuracy", "activation", ("dataset", "version", "regulariser"))
    command.print_table(
        "Mean accuracy in percent over the eight data sets, and the mean rank of each activation "
        f"(Friedman's p {ranks.p:.2g})",
        ("regulariser", *activations),
        [
            *([name, *(f"{value:.2f}" for value in line.values())] for name, line in grid.items()),
            ["mean rank", *(f"{ranks.ranks[name]:.2f}" for name in activations)],
        ],
    )
    command.print_table(
        "Tail ratio of the layer Jacobian and nonlinearity, mean over data sets and seeds",
        ("regulariser", *activations),
        [
            [
                name,
                *(
                    f"{mean(activation, name, 'tail_ratio'):.3f}, {mean(activation, name, 'nonlinearity'):.3f}"
                    for activation in activations
                ),
            ]
            for name in regularisers
        ],
    )
    with pictures.figure(out / "sweep_accuracy.png", "Mean accuracy in percent over eight data sets") as axes:
        pictures.draw_grid(axes, grid, digits=2)


def _report_noise(clean: Sequence[Row], regularisers: Sequence[str], out: Path) -> None:
    series = {}
    lines = []
    for name in regularisers:
        chosen = [row for row in clean if row["regulariser"] == name]
        means = [
            float(np.mean([row[column] for row in chosen]))
            for column in ("accuracy", *(f"accuracy, noise {noise}" for noise in NOISES))
        ]
        added = statistics.interval(gains(clean, f"accuracy, noise {NOISES[-1]}", name)) if name != NONE else None
        lines.append([name, *(f"{100 * value:.2f}" for value in means), "" if added is None else added.percent()])
        series[name] = ((0.0, *NOISES), [100 * value for value in means], [0.0] * len(means))
    command.print_table(
        "Accuracy in percent under Gaussian noise on the test inputs, clean versions, and what the regulariser adds at "
        f"{NOISES[-1]:g}, in points, with the 95 % interval over data sets and seeds",
        ("regulariser", "0", *(str(noise) for noise in NOISES), "added"),
        lines,
    )
    with pictures.figure(out / "sweep_noise.png", "Accuracy under noise on the test inputs, clean versions") as axes:
        pictures.draw_lines(axes, series, xlabel="standard deviation of the noise", ylabel="accuracy, %")


def _report_little(
    clean: Sequence[Row], little: Sequence[Row], activations: Sequence[str], regularisers: Sequence[str], out: Path
) -> None:
    named = [name for name in regularisers if name != NONE]
    command.print_table(
        "What a regulariser adds to the accuracy, in points, clean versions, with the 95 % interval over data sets "
        "and seeds",
        ("regulariser", "all training data", f"{LITTLE:.0%} of it"),
        [
            [name, *(statistics.interval(gains(rows, "accuracy", name)).percent() for rows in (clean, little))]
            for name in named
        ],
    )
    command.print_table(
        "What DREG adds, likewise, by activation",
        ("activation", "all training data", f"{LITTLE:.0%} of it"),
        [
            [name, *(statistics.interval(gains(rows, "accuracy", DREG, name)).percent() for rows in (clean, little))]
            for name in activations
        ],
    )
    with pictures.figure(
        out / "sweep_little_data.png", "What a regulariser adds to the accuracy, 95 % intervals", 1, 2, size=(10, 3.5)
    ) as axes:
        for one, rows, title in zip(axes, (clean, little), ("all training data", f"{LITTLE:.0%} of it"), strict=True):
            found = {name: statistics.interval(gains(rows, "accuracy", name)) for name in named}
            bars = {name: (100 * value.mean, 100 * value.half_width) for name, value in found.items()}
            pictures.draw_bars(one, bars, [DREG], title=title, xlabel="points")
            one.axvline(0, color="black", linewidth=1)


def settings_of(quick: bool) -> Settings:
    """Of the trainings."""
    return QUICK_SETTINGS if quick else SETTINGS


def shared(settings: Settings) -> Row:
    """What all runs share."""
    return {
        "width": WIDTH,
        "strength": STRENGTH,
        "steps": settings.steps,
        "batch": settings.batch,
        "learning_rate": settings.learning_rate,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    arguments = command.parser("sweep", __doc__, reads_pima=True).parse_args(argv)
    out = command.folder(arguments)
    wanted = configurations(arguments.quick)
    with command.refusing(arguments):
        datasets = {name: data.load(name, arguments.data) for name in dict.fromkeys(row["dataset"] for row in wanted)}
    settings = settings_of(arguments.quick)
    rows = command.rows(
        arguments, "sweep", (KEYS, VALUES), shared(settings), wanted, lambda one: run(datasets, one, settings)
    )
    report(rows, out)
    print(f"\nResults and pictures: {out}")


if __name__ == "__main__":
    main()

"""The tail ratio on the Pima data by width and strength, beside the nonlinearity: python -m studies.tail_ratio

The papers give 1.01 to 1.02 for ChainzRule and 1.07 to 1.09 for other activations, and do not say of what. Every
candidate of :func:`studies.measures.tail_ratios` is measured on networks of several widths, with DREG of several
strengths, and with little data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from studies import command, data, measures, pictures
from studies.networks import CHAINZRULE
from studies.penalties import DREG, NONE, STRENGTH, learner
from studies.pima import TAILS
from studies.store import Row
from studies.training import Settings, train

WIDTHS = (16, 64, 256)
NETS = (
    ("ReLU", NONE, 0.0),
    ("GELU", NONE, 0.0),
    ("tanh", NONE, 0.0),
    (CHAINZRULE, NONE, 0.0),
    (CHAINZRULE, DREG, STRENGTH),
    (CHAINZRULE, DREG, 10 * STRENGTH),
    (CHAINZRULE, DREG, 100 * STRENGTH),
)
FRACTIONS = (0.05, 1.0)
SPLITS = 3
SETTINGS = Settings(steps=300, learning_rate=3e-3)
QUICK_SETTINGS = Settings(steps=20, learning_rate=3e-3)

KEYS = {"activation": str, "regulariser": str, "strength": float, "width": int, "fraction": float, "split": int}
VALUES = {"accuracy": float, "nonlinearity": float, **dict.fromkeys(TAILS, float)}


def configurations(quick: bool) -> list[Row]:
    """All runs."""
    nets = NETS[:1] + NETS[-1:] if quick else NETS
    widths, splits = (WIDTHS[:1], 1) if quick else (WIDTHS, SPLITS)
    return [
        dict(zip(KEYS, (*net, width, fraction, split), strict=True))
        for split, fraction, width, net in itertools.product(range(splits), FRACTIONS, widths, nets)
    ]


def run(pima: data.Dataset, configuration: Row, settings: Settings) -> Row:
    """One run."""
    split, width = configuration["split"], configuration["width"]
    parts = data.split(pima, split, configuration["fraction"])
    sizes = (parts.features, width, width, parts.classes)
    student = learner(
        sizes, configuration["activation"], configuration["regulariser"], split, configuration["strength"]
    )
    train(student, parts.train_x, parts.train_y, settings, split)
    model, x, y = student.model, parts.test_x, parts.test_y
    tails = measures.tail_ratios(model, x, y)
    return {
        "accuracy": measures.accuracy(model, x, y),
        "nonlinearity": measures.nonlinearity(model, x),
        **{name: tails[name] for name in TAILS},
    }


def label(row: Row) -> str:
    """How the network of a run is called."""
    if row["regulariser"] == NONE:
        return row["activation"]
    return f"{row['activation']}, λ = 10^{np.log10(row['strength']):.1f}"


def report(rows: Sequence[Row], out: Path) -> None:
    """Print the table and draw the picture."""
    nets = list(dict.fromkeys(label(row) for row in rows))
    widths = sorted({row["width"] for row in rows})
    fractions = sorted({row["fraction"] for row in rows})

    def mean(net: str, width: int, fraction: float, column: str) -> float:
        chosen = [row for row in rows if (label(row), row["width"], row["fraction"]) == (net, width, fraction)]
        return float(np.mean([row[column] for row in chosen]))

    for fraction in fractions:
        command.print_table(
            f"Pima, {fraction:.0%} of the training data: p99 / mean over the test part, mean of the splits",
            ("network", "width", "accuracy, %", "nonlinearity", *TAILS),
            [
                [
                    net,
                    str(width),
                    f"{100 * mean(net, width, fraction, 'accuracy'):.1f}",
                    f"{mean(net, width, fraction, 'nonlinearity'):.3f}",
                    *(f"{mean(net, width, fraction, name):.3f}" for name in TAILS),
                ]
                for net, width in itertools.product(nets, widths)
            ],
        )
    title = "Pima, all training data: tail ratio against nonlinearity, a point for each width"
    with pictures.figure(out / "tail_ratio.png", title, 1, 2, size=(12, 4.5)) as axes:
        for one, statistic in zip(axes, ("layer Jacobian", "slopes"), strict=True):
            for position, net in enumerate(nets):
                one.scatter(
                    [mean(net, width, 1.0, "nonlinearity") for width in widths],
                    [mean(net, width, 1.0, statistic) for width in widths],
                    label=net,
                    color=pictures.COLOURS[position],
                    marker=pictures.MARKERS[position],
                )
            for low, high, name in ((1.01, 1.02, "the papers' ChainzRule"), (1.07, 1.09, "the papers' other networks")):
                one.axhspan(low, high, color="black", alpha=0.12)
                one.text(one.get_xlim()[1], (low + high) / 2, name, va="center", ha="right", fontsize=8)
            one.set(title=statistic, xlabel="nonlinearity", ylabel="p99 / mean", ylim=(1, None))
        axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    arguments = command.parser("tail_ratio", __doc__, reads_pima=True).parse_args(argv)
    out = command.folder(arguments)
    with command.refusing(arguments):
        pima = data.load("Pima", arguments.data)
    settings = QUICK_SETTINGS if arguments.quick else SETTINGS
    shared = {"steps": settings.steps, "batch": settings.batch, "learning_rate": settings.learning_rate}
    runs = configurations(arguments.quick)
    report(
        command.rows(arguments, "tail_ratio", (KEYS, VALUES), shared, runs, lambda one: run(pima, one, settings)), out
    )
    print(f"\nResults and picture: {out}")


if __name__ == "__main__":
    main()

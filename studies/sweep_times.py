"""The time of DREG by the fused ops against the same penalty in plain PyTorch: python -m studies.sweep_times

The DREG runs of the sweep's first seed in three ways, one behind the other for each run: without a penalty, with the
fused ops, and with the penalty written in PyTorch's own operations; then single steps by width. It wants an otherwise
idle machine, and takes five minutes of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from studies import command, data, pictures
from studies.networks import CHAINZRULE
from studies.penalties import DREG, DREG_PLAIN, NONE, learner
from studies.store import Row
from studies.sweep import ACTIVATIONS, VERSIONS, WIDTH, settings_of, shared
from studies.training import Settings, train

WAYS = {"without": NONE, "fused": DREG, "plain PyTorch": DREG_PLAIN}
REPEATS = 2
WIDTHS = (16, 64, 256, 1024)
STEPS = 20
BATCH = 256
STEP = "step"
"""In place of the data set: the digits, at :data:`WIDTHS`, for :data:`STEPS` steps of :data:`BATCH`."""

KEYS = {"what": str, "activation": str, "repeat": int, "way": str, "width": int}
VALUES = {"steps": int, "seconds": float, "process_seconds": float}


def configurations(quick: bool) -> list[Row]:
    """All timed trainings, in the order in which they are timed."""
    names = ("wine",) if quick else data.NAMES
    activations = ("ReLU", CHAINZRULE) if quick else ACTIVATIONS
    widths = WIDTHS[:1] if quick else WIDTHS
    repeats = range(1 if quick else REPEATS)
    runs = [
        (f"{name}, {version}", activation, repeat, way, WIDTH)
        for repeat, name, version, activation, way in itertools.product(repeats, names, VERSIONS, activations, WAYS)
    ]
    steps = [
        (STEP, activation, repeat, way, width)
        for repeat, width, activation, way in itertools.product(repeats, widths, activations, WAYS)
    ]
    return [dict(zip(KEYS, values, strict=True)) for values in runs + steps]


def run(datasets: Mapping[str, data.Dataset], configuration: Row, settings: Settings) -> Row:
    """One timed training."""
    if configuration["what"] == STEP:
        parts = data.split(datasets["digits"], 0)
        settings = Settings(steps=STEPS, batch=BATCH, learning_rate=settings.learning_rate)
    else:
        name, version = configuration["what"].split(", ")
        parts = data.split(datasets[name], 0, noisy=version == "noisy")
    width = configuration["width"]
    sizes = (parts.features, width, width, parts.classes)
    # A few steps first, which fill the caches.
    for chosen in (Settings(steps=3, batch=settings.batch), settings):
        student = learner(sizes, configuration["activation"], WAYS[configuration["way"]], 0)
        history = train(student, parts.train_x, parts.train_y, chosen, 0)
    return {"steps": settings.steps, "seconds": history.seconds, "process_seconds": history.process_seconds}


def per_step(rows: Sequence[Row], activation: str | None, way: str) -> float:
    """Process seconds of a step, over all the rows of a way, and of an activation unless it is None."""
    chosen = [row for row in rows if activation in (None, row["activation"]) and row["way"] == way]
    return sum(row["process_seconds"] for row in chosen) / sum(row["steps"] for row in chosen)


def report(rows: Sequence[Row], out: Path) -> None:
    """Print the tables and draw the picture."""
    activations = list(dict.fromkeys(row["activation"] for row in rows))
    columns = (*WAYS, "plain PyTorch over fused")

    def cells(chosen: Sequence[Row], activation: str | None) -> list[str]:
        times = {way: per_step(chosen, activation, way) for way in WAYS}
        ratio = times["plain PyTorch"] / times["fused"]
        return [*(f"{1e3 * value:.3f}" for value in times.values()), f"{ratio:.2f}"]

    trainings = [row for row in rows if row["what"] != STEP]
    command.print_table(
        f"Process time of a training step in milliseconds, width {WIDTH}, mean of the trainings on all data sets",
        ("activation", *columns),
        [[activation or "all", *cells(trainings, activation)] for activation in (*activations, None)],
    )
    steps = [row for row in rows if row["what"] == STEP]
    widths = sorted({row["width"] for row in steps})
    at_width = {width: [row for row in steps if row["width"] == width] for width in widths}
    command.print_table(
        f"The same by width, digits, batch {BATCH}",
        ("activation", "width", *columns),
        [
            [activation, str(width), *cells(at_width[width], activation)]
            for activation in activations
            for width in widths
        ],
    )
    title = f"A training step with DREG: time in plain PyTorch over fused, digits, batch {BATCH}"
    with pictures.figure(out / "sweep_times.png", title, size=(7, 4)) as axes:
        series = {}
        for name in activations:
            ratios = [
                per_step(at_width[width], name, "plain PyTorch") / per_step(at_width[width], name, "fused")
                for width in widths
            ]
            series[name] = (widths, ratios, [0.0] * len(ratios))
        pictures.draw_lines(axes, series, xscale="log", xlabel="width", ylabel="ratio")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.axhline(1, color="black", linewidth=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    arguments = command.parser("sweep_times", __doc__, reads_pima=True).parse_args(argv)
    out = command.folder(arguments)
    wanted = configurations(arguments.quick)
    needed = {"digits", *(row["what"].split(", ")[0] for row in wanted if row["what"] != STEP)}
    with command.refusing(arguments):
        datasets = {name: data.load(name, arguments.data) for name in needed}
    settings = settings_of(arguments.quick)
    rows = command.rows(
        arguments, "sweep_times", (KEYS, VALUES), shared(settings), wanted, lambda one: run(datasets, one, settings)
    )
    report(rows, out)
    print(f"\nResults and picture: {out}")


if __name__ == "__main__":
    main()

"""Schedules for DREG's strength under noise in the representations: python -m studies.schedules

The claim of arXiv 2606.07908: the strength should be annealed. Shape and range are open there, and so is what noise
in the representations is. Here it is Gaussian noise on what each layer but the first is given, its deviation a multiple
of the root mean square of that sample's representation, when the net is tested. Noise on the inputs stands beside it.
All schedules of a strength have the same mean over the steps, so that only their shapes differ.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chainzrule_kernels as ck
from studies import command, data, measures, pictures, statistics
from studies.networks import CHAINZRULE, network
from studies.penalties import STRENGTH, Learner
from studies.store import Row
from studies.training import Clock, Settings, train

NONE, CONSTANT = "no penalty", "constant"
SHAPES = {"linear": ck.schedules.linear, "cosine": ck.schedules.cosine, "exponential": ck.schedules.exponential}
FALLING = tuple(f"{shape}, falling" for shape in SHAPES)
RISING = tuple(f"{shape}, rising" for shape in SHAPES)
SCHEDULES = (NONE, CONSTANT, *FALLING, *RISING)
EXPONENTIAL_RANGE = 100.0
"""How many times as large an exponential is at its one end as at the other; the others go to zero."""

STRENGTHS = (STRENGTH, 10 * STRENGTH)
DATASETS = ("digits", "breast cancer")
TRAINING_NOISES = (0.0,)
"""Noise in the representations while the net is trained; what stands here is run."""
SEEDS = 5
HIDDEN_NOISES = (0.25, 0.5, 1.0, 2.0)
INPUT_NOISES = (0.5, 1.0)
WIDTH = 64
STEPS = 300

KEYS = {"dataset": str, "training_noise": float, "schedule": str, "strength": float, "seed": int}
NOISY = {f"accuracy, hidden noise {noise:g}": (noise, 0.0) for noise in HIDDEN_NOISES} | {
    f"accuracy, input noise {noise:g}": (0.0, noise) for noise in INPUT_NOISES
}
VALUES = {
    "accuracy": float,
    **dict.fromkeys(NOISY, float),
    "jacobian": float,
    "peak_volatility": float,
    "seconds": float,
    "process_seconds": float,
}


def schedule(name: str, steps: int) -> ck.schedules.Schedule:
    """The factor on the strength; its mean over the steps is 1.

    Raises:
        ValueError: for a name that is not in :data:`SCHEDULES`, and for "no penalty".
    """
    if name == CONSTANT:
        return ck.schedules.constant()
    if name not in (*FALLING, *RISING):
        raise ValueError(f"name: expected one of {', '.join(SCHEDULES[1:])}, got {name!r}")
    shape, direction = name.split(", ")
    high, low = (1.0, 1 / EXPONENTIAL_RANGE) if shape == "exponential" else (1.0, 0.0)
    start, end = (high, low) if direction == "falling" else (low, high)
    raw = SHAPES[shape](start, end, steps)
    mean = sum(raw(step) for step in range(steps)) / steps
    return SHAPES[shape](start / mean, end / mean, steps)


@contextmanager
def representation_noise(model: nn.Sequential, noise: float, seed: int) -> Iterator[None]:
    """Within it, the input ``h`` of each layer but the first becomes ``h + noise · rms(h) · N(0, 1)``.

    The root mean square is that of the sample. Over a batch, one sample on which a cubic is huge would drown the rest.

    Args:
        model: from :func:`studies.networks.network`.
        noise: 0 changes nothing.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)

    def add_noise(layer: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        (hidden,) = arguments
        size = hidden.detach().square().mean(-1, keepdim=True).sqrt()
        return hidden + noise * size * torch.randn(hidden.shape, generator=generator).to(hidden.device)

    layers = [layer for layer in model if hasattr(layer, "weight")][1:] if noise else []
    handles = [layer.register_forward_pre_hook(add_noise) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def configurations(quick: bool) -> list[Row]:
    """All runs; those without a penalty once for all strengths."""
    datasets, strengths, seeds = (DATASETS[1:], STRENGTHS[:1], 2) if quick else (DATASETS, STRENGTHS, SEEDS)
    return [
        dict(zip(KEYS, (dataset, training_noise, name, strength, seed), strict=True))
        for training_noise in TRAINING_NOISES
        for seed in range(seeds)
        for dataset in datasets
        for name in SCHEDULES
        for strength in (strengths if name != NONE else (0.0,))
    ]


_dataset = functools.cache(data.load)


def run(configuration: Row, steps: int) -> Row:
    """One training, and the accuracy of the net under each noise."""
    seed = configuration["seed"]
    parts = data.split(_dataset(configuration["dataset"]), seed)
    torch.manual_seed(seed)
    model = network((parts.features, WIDTH, WIDTH, parts.classes), CHAINZRULE)
    name = configuration["schedule"]
    factor = ck.schedules.constant(0.0) if name == NONE else schedule(name, steps)
    regulariser = ck.DREG(model, strength=configuration["strength"], schedule=factor)

    def objective(x: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), target)
        return loss if name == NONE else loss + regulariser.penalty()

    settings = Settings(steps=steps, gradient_norms=True)
    clock = Clock()
    with representation_noise(model, configuration["training_noise"], seed):
        history = train(
            Learner(model, objective), parts.train_x, parts.train_y, settings, seed, lambda step: regulariser.step()
        )
    times = clock.read()
    regulariser.remove()
    return {
        "accuracy": measures.accuracy(model, parts.test_x, parts.test_y),
        **{column: _noisy_accuracy(model, parts, *noises, seed) for column, noises in NOISY.items()},
        "jacobian": measures.layer_jacobian_squares(model, parts.test_x, "layer").sqrt().mean().item(),
        "peak_volatility": ck.peak_volatility(history.gradient_norms),
        **times,
    }


def _noisy_accuracy(model: nn.Sequential, parts: data.Parts, hidden: float, inputs: float, seed: int) -> float:
    # Several draws for each sample, since the test parts are small.
    draws = 8
    x, y = parts.test_x.repeat(draws, 1), parts.test_y.repeat(draws)
    with representation_noise(model, hidden, seed):
        return measures.noisy_accuracy(model, x, y, inputs, seed)


# ---- what came out --------------------------------------------------------------------------------------------------

COLUMNS = ("accuracy", *NOISY)


def values_of(rows: Sequence[Row], column: str, **wanted: Any) -> list[float]:
    """A column of some runs, in an order that is the same for each schedule."""
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row[column] for row in sorted(chosen, key=lambda row: (row["dataset"], row["seed"]))]


def report(rows: Sequence[Row], out: Path) -> None:
    """Print the tables and draw the picture."""
    strengths = sorted({row["strength"] for row in rows if row["schedule"] != NONE})
    for training_noise in TRAINING_NOISES:
        for strength in strengths:
            _report_one(rows, training_noise, strength)
    _draw(rows, strengths, out)


def _report_one(rows: Sequence[Row], training_noise: float, strength: float) -> None:
    def found(name: str, column: str) -> list[float]:
        given = 0.0 if name == NONE else strength
        return values_of(rows, column, schedule=name, training_noise=training_noise, strength=given)

    judged = {name: _mean_over_noises(found, name) for name in SCHEDULES}
    ranking = statistics.friedman(judged)
    against = statistics.compare(judged[CONSTANT], {name: judged[name] for name in SCHEDULES if name != CONSTANT})
    lines = []
    for name in SCHEDULES:
        comparison = against.get(name)
        lines.append(
            [
                name,
                *(f"{100 * statistics.interval(found(name, column)).mean:.1f}" for column in COLUMNS),
                f"{ranking.ranks[name]:.2f}",
                "" if comparison is None else f"{-100 * comparison.difference:+.2f}",
                "" if comparison is None else f"{comparison.corrected:.2g}",
            ]
        )
    command.print_table(
        f"Noise {training_noise:g} in training, mean strength {strength:.2g}: mean accuracy in percent over data sets "
        f"and seeds; rank by the mean over the noises (Friedman's p {ranking.p:.2g}), and what that mean is ahead of "
        "the constant's, with Wilcoxon's p after Holm's correction",
        ("schedule", "clean", *(column.removeprefix("accuracy, ") for column in NOISY), "rank", "ahead", "p"),
        lines,
    )


def _mean_over_noises(found: Any, name: str) -> list[float]:
    return [sum(values) / len(values) for values in zip(*(found(name, column) for column in NOISY), strict=True)]


def _draw(rows: Sequence[Row], strengths: Sequence[float], out: Path) -> None:
    title = f"Accuracy under noise in the hidden representations, {CHAINZRULE}, less that of the constant strength"
    lines, columns = len(TRAINING_NOISES), len(strengths)
    size = (max(9.0, 4.2 * columns), 1 + 3.4 * lines)
    with pictures.figure(out / "schedules.png", title, lines, columns, size) as drawn:
        grid = np.atleast_1d(drawn).reshape(lines, columns)
        for line, training_noise in zip(grid, TRAINING_NOISES, strict=True):
            for axes, strength in zip(line, strengths, strict=True):
                series = {}
                for position, name in enumerate((*FALLING, *RISING)):
                    points = [
                        _gain(rows, column, name, training_noise=training_noise, strength=strength)
                        for column in COLUMNS[: 1 + len(HIDDEN_NOISES)]
                    ]
                    places = [place + 0.1 * (position - 2.5) for place in range(len(points))]
                    series[name] = places, [mean for mean, _ in points], [half for _, half in points]
                pictures.draw_lines(
                    axes, series, title=f"mean λ = {strength:.1g}, training noise {training_noise:g}", ylabel="points"
                )
                axes.set_xticks(range(1 + len(HIDDEN_NOISES)), ["none", *(f"{noise:g}" for noise in HIDDEN_NOISES)])
                axes.axhline(0, color="black", linewidth=0.8)
                axes.get_legend().remove()
        for axes in grid[-1]:
            axes.set_xlabel("noise when tested")
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _gain(rows: Sequence[Row], column: str, name: str, training_noise: float, strength: float) -> tuple[float, float]:
    """What a schedule is ahead of the constant, in percentage points, with the half width of its interval."""
    given = 0.0 if name == NONE else strength
    its = values_of(rows, column, schedule=name, training_noise=training_noise, strength=given)
    constant = values_of(rows, column, schedule=CONSTANT, training_noise=training_noise, strength=strength)
    spread = statistics.interval([100 * (one - other) for one, other in zip(its, constant, strict=True)])
    return spread.mean, spread.half_width


def main() -> None:
    """Run the study."""
    arguments = command.parser("schedules", __doc__).parse_args()
    out = command.folder(arguments)
    steps = 20 if arguments.quick else STEPS
    runs, shared = configurations(arguments.quick), {"width": WIDTH, "steps": steps}
    report(command.rows(arguments, "schedules", (KEYS, VALUES), shared, runs, lambda one: run(one, steps)), out)
    print(f"\nResults and pictures: {out}")


if __name__ == "__main__":
    main()

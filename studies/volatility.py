"""Volatility of the gradient, and how many parameters it takes: python -m studies.volatility

The claims of arXiv 2605.15463: the peak volatility of ChainzRule's gradients is 23.1 % lower, and it takes 15.5 times
fewer parameters. The term is not defined there; here it is the largest norm of the gradient over the steps, divided by
the median (ck.peak_volatility), and other readings stand beside it. Digits of scikit-learn, or MNIST with --data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import chainzrule_kernels as ck
from studies import command, data, measures, pictures, statistics
from studies.networks import CHAINZRULE
from studies.penalties import DREG, NONE, learner
from studies.store import Row
from studies.training import Clock, Settings, train

METHODS = {
    "ReLU": ("ReLU", NONE),
    "GELU": ("GELU", NONE),
    "ReLU, spectral norm": ("ReLU", "spectral norm"),
    "ReLU, input gradient": ("ReLU", "input gradient"),
    CHAINZRULE: (CHAINZRULE, NONE),
    f"{CHAINZRULE}, {DREG}": (CHAINZRULE, DREG),
}
OURS = (CHAINZRULE, f"{CHAINZRULE}, {DREG}")
PAPER_VOLATILITY = -23.1
PAPER_PARAMETERS = 15.5

WIDTH = 64
WINDOW = 20
SEEDS = 10
DECAYS = ("constant", "cosine")
HIDDEN_LAYERS = (1, 3)
READINGS: dict[str, Callable[[Tensor], float]] = {
    "max / median": ck.peak_volatility,
    "max / mean": lambda norms: (norms.max() / norms.mean()).item(),
    "99th percentile / median": lambda norms: (norms.quantile(0.99) / norms.median()).item(),
    "max": lambda norms: norms.max().item(),
    "largest deviation in a window": lambda norms: norms.unfold(0, WINDOW, 1).std(-1).max().item(),
    "largest relative deviation in a window": lambda norms: _relative_deviations(norms).max().item(),
}
"""What "peak volatility" of the norms of the gradient at each step may mean; the first is this package's choice."""

KEYS = {"method": str, "hidden_layers": int, "learning_rate": str, "seed": int}
VALUES = {
    **dict.fromkeys(READINGS, float),
    "accuracy": float,
    "loss": float,
    "seconds": float,
    "process_seconds": float,
}

# ---- parameters -----------------------------------------------------------------------------------------------------

SIZED = {
    "ReLU": ("ReLU", NONE),
    "GELU": ("GELU", NONE),
    CHAINZRULE: (CHAINZRULE, NONE),
    f"{CHAINZRULE}, {DREG}": (CHAINZRULE, DREG),
}
WIDTHS = (2, 4, 6, 8, 12, 16, 32, 64, 128)
SIZED_LAYERS = (1, 2)
SIZED_SEEDS = 4
MARGINS = (0.0, 0.5, 1.0)
"""How many percentage points below the best perceptron still count as a match."""
SIZED_KEYS = {"method": str, "hidden_layers": int, "width": int, "seed": int}
SIZED_VALUES = {"parameters": int, "accuracy": float, "seconds": float, "process_seconds": float}


def _relative_deviations(norms: Tensor) -> Tensor:
    windows = norms.unfold(0, WINDOW, 1)
    return windows.std(-1) / windows.mean(-1)


Splits = Callable[[int], data.Parts]
"""From a seed to its training and test part."""


def splits(path: Path | None) -> Splits:
    """Those of scikit-learn's digits, anew for each seed, or the one of MNIST at a path."""
    if path is not None:
        mnist = data.mnist(path)
        return lambda seed: mnist
    digits = data.load("digits")
    return functools.cache(lambda seed: data.split(digits, seed))


def configurations(quick: bool) -> list[Row]:
    """The runs whose gradients are watched."""
    return [
        dict(zip(KEYS, (method, layers, decay, seed), strict=True))
        for seed in range(2 if quick else SEEDS)
        for layers in (HIDDEN_LAYERS[:1] if quick else HIDDEN_LAYERS)
        for decay in DECAYS
        for method in METHODS
    ]


def run(configuration: Row, parts_of: Splits, steps: int) -> Row:
    """One training, and its norms of the gradient of loss and penalty, read in each way."""
    seed = configuration["seed"]
    parts = parts_of(seed)
    sizes = (parts.features, *[WIDTH] * configuration["hidden_layers"], parts.classes)
    student = learner(sizes, *METHODS[configuration["method"]], seed)
    settings = Settings(steps=steps, decays=configuration["learning_rate"] == "cosine", gradient_norms=True)
    clock = Clock()
    history = train(student, parts.train_x, parts.train_y, settings, seed)
    return {
        **{name: read(history.gradient_norms) for name, read in READINGS.items()},
        "accuracy": measures.accuracy(student.model, parts.test_x, parts.test_y),
        "loss": history.losses[-WINDOW:].mean().item(),
        **clock.read(),
    }


def sized_configurations(quick: bool) -> list[Row]:
    """The runs of nets of many sizes."""
    return [
        dict(zip(SIZED_KEYS, (method, layers, width, seed), strict=True))
        for seed in range(2 if quick else SIZED_SEEDS)
        for layers in (SIZED_LAYERS[:1] if quick else SIZED_LAYERS)
        for width in (WIDTHS[1:3] if quick else WIDTHS)
        for method in SIZED
    ]


def run_sized(configuration: Row, parts_of: Splits, steps: int) -> Row:
    """One training."""
    seed = configuration["seed"]
    parts = parts_of(seed)
    sizes = (parts.features, *[configuration["width"]] * configuration["hidden_layers"], parts.classes)
    student = learner(sizes, *SIZED[configuration["method"]], seed)
    clock = Clock()
    train(student, parts.train_x, parts.train_y, Settings(steps=steps), seed)
    return {
        "parameters": sum(parameter.numel() for parameter in student.model.parameters()),
        "accuracy": measures.accuracy(student.model, parts.test_x, parts.test_y),
        **clock.read(),
    }


# ---- what came out --------------------------------------------------------------------------------------------------


def values_of(rows: Sequence[Row], column: str, **wanted: Any) -> list[float]:
    """A column of some runs, in an order that is the same for each method."""
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [
        row[column]
        for row in sorted(chosen, key=lambda row: (row["hidden_layers"], row.get("learning_rate"), row["seed"]))
    ]


def geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean, and the ends of Student's 95 % interval of the mean logarithm, for what is skewed."""
    spread = statistics.interval([math.log(value) for value in values])
    low, high = spread.mean - spread.half_width, spread.mean + spread.half_width
    return math.exp(spread.mean), math.exp(low), math.exp(high)


def change(rows: Sequence[Row], reading: str, ours: str, other: str) -> tuple[float, float, float]:
    """The change of a reading from another method to ours in percent, with the ends of its interval.

    A seed's value is the geometric mean of the ratios in its settings; the interval is that of :func:`geometric` over
    the seeds.
    """
    ratios = []
    for seed in sorted({row["seed"] for row in rows}):
        pairs = zip(*(values_of(rows, reading, method=method, seed=seed) for method in (ours, other)), strict=True)
        ratios.append(float(np.exp(np.mean([math.log(one / reference) for one, reference in pairs]))))
    middle, low, high = geometric(ratios)
    return 100 * (middle - 1), 100 * (low - 1), 100 * (high - 1)


def report(rows: Sequence[Row], out: Path, name: str) -> None:
    """Print the tables of the volatility and draw its picture."""
    places = list(dict.fromkeys((row["hidden_layers"], row["learning_rate"]) for row in rows))
    for layers, decay in places:
        chosen = {"hidden_layers": layers, "learning_rate": decay}
        lines = []
        for method in METHODS:
            line = [method]
            for reading in READINGS:
                line.append(f"{geometric(values_of(rows, reading, method=method, **chosen))[0]:.3g}")
            spread = statistics.interval(values_of(rows, "accuracy", method=method, **chosen))
            lines.append([*line, spread.percent()])
        command.print_table(
            f"{layers} hidden layers of {WIDTH}, {decay} learning rate: each reading of the peak volatility, geometric "
            "mean over the seeds; accuracy in percent",
            ("method", *READINGS, "accuracy"),
            lines,
        )
    for ours in OURS:
        lines = []
        for other in METHODS:
            if other in OURS:
                continue
            line = [other]
            for reading in READINGS:
                middle, low, high = change(rows, reading, ours, other)
                line.append(f"{middle:+.0f} ({low:+.0f} to {high:+.0f})")
            lines.append(line)
        command.print_table(
            f"Change from each to {ours} in percent, over all settings, with 95 % intervals", ("from", *READINGS), lines
        )
    _draw(rows, places, out, name)


def _draw(rows: Sequence[Row], places: Sequence[tuple[int, str]], out: Path, name: str) -> None:
    reading = next(iter(READINGS))
    title = f"Peak volatility of the gradient norm, {reading}, on {name}: geometric mean and 95 % interval"
    heights = range(len(METHODS) - 1, -1, -1)
    size = (max(9.0, 2.9 * len(places) + 1.4), 3.6)
    with pictures.figure(out / "volatility.png", title, 1, len(places), size) as grid:
        ends = []
        for position, (axes, (layers, decay)) in enumerate(zip(np.atleast_1d(grid), places, strict=True)):
            for height, method in zip(heights, METHODS, strict=True):
                middle, low, high = geometric(
                    values_of(rows, reading, method=method, hidden_layers=layers, learning_rate=decay)
                )
                ends += [low, high]
                colour = pictures.COLOURS[1 if method in OURS else 0]
                axes.errorbar(
                    [middle], [height], xerr=[[middle - low], [high - middle]], color=colour, fmt="o", capsize=3
                )
            layer_word = "layer" if layers == 1 else "layers"
            axes.set(xscale="log", xlabel=reading, title=f"{layers} hidden {layer_word}, {decay} rate")
            axes.set_yticks(heights, METHODS if position == 0 else [""] * len(METHODS))
        for axes in np.atleast_1d(grid):
            # Whole decades, alike everywhere, so that the ticks can be read.
            axes.set_xlim(10 ** math.floor(math.log10(min(ends))), 10 ** math.ceil(math.log10(max(ends))))
            axes.minorticks_off()


Size = tuple[str, int, int]
"""Method, hidden layers and width."""


def accuracies(rows: Sequence[Row]) -> tuple[dict[Size, np.ndarray], dict[Size, int]]:
    """Of each net its accuracies, seed by seed, and its number of parameters."""
    found: dict[Size, dict[int, float]] = {}
    parameters: dict[Size, int] = {}
    for row in rows:
        size = row["method"], row["hidden_layers"], row["width"]
        found.setdefault(size, {})[row["seed"]] = row["accuracy"]
        parameters[size] = row["parameters"]
    return {size: np.array([of[seed] for seed in sorted(of)]) for size, of in found.items()}, parameters


def matches(
    means: dict[Size, float], parameters: dict[Size, int], margin: float
) -> tuple[Size, Size | None, Size | None]:
    """The best perceptron, and the smallest perceptron and ChainzRule net that come up to it within a margin.

    Args:
        means: accuracies.
        parameters: how many each net has.
        margin: in percentage points.
    """
    fixed = [size for size in means if size[0] not in OURS]
    # Of equally good ones the smallest.
    best = max(fixed, key=lambda size: (means[size], -parameters[size]))
    enough = {size for size in means if means[size] >= means[best] - margin / 100 - 1e-12}

    def smallest(sizes: Sequence[Size]) -> Size | None:
        return min((size for size in sizes if size in enough), key=lambda size: parameters[size], default=None)

    return best, smallest(fixed), smallest([size for size in means if size[0] in OURS])


def report_sizes(rows: Sequence[Row], out: Path, name: str) -> None:
    """Print which ChainzRule net matches, and draw accuracy over parameters."""
    found, parameters = accuracies(rows)
    seeds = len(next(iter(found.values())))
    draws = np.random.default_rng(0).integers(seeds, size=(2000, seeds))
    lines = []
    for margin in MARGINS:
        best, small, ours = matches({size: float(of.mean()) for size, of in found.items()}, parameters, margin)
        ratios: dict[int, list[float]] = {0: [], 1: []}
        for draw in draws:
            ends = matches({size: float(of[draw].mean()) for size, of in found.items()}, parameters, margin)
            for position in ratios:
                ratios[position].append(_ratio(ends[position], ends[2], parameters))
        lines.append(
            [
                f"{margin:g}",
                *(_describe(size, found, parameters) for size in (best, small, ours)),
                *(
                    f"{_number(_ratio(size, ours, parameters))} ({_range(ratios[position])})"
                    for position, size in enumerate((best, small))
                ),
            ]
        )
    command.print_table(
        f"Parameters on {name}: within a margin of percentage points of the best perceptron; the ratios with the "
        "95 % range over seeds drawn anew",
        (
            "margin",
            "best perceptron",
            "smallest perceptron",
            "smallest ChainzRule",
            "best / ChainzRule",
            "smallest / ChainzRule",
        ),
        lines,
    )
    layers = sorted({size[1] for size in found})
    with pictures.figure(
        out / "parameters.png",
        f"Accuracy over parameters on {name}: mean and 95 % interval",
        1,
        len(layers),
        (5.5 * len(layers), 4.2),
    ) as row_of_axes:
        for axes, hidden in zip(np.atleast_1d(row_of_axes), layers, strict=True):
            series = {}
            for method in SIZED:
                sizes = [size for size in found if size[:2] == (method, hidden)]
                spreads = [statistics.interval(list(100 * found[size])) for size in sizes]
                series[method] = (
                    [parameters[size] for size in sizes],
                    [spread.mean for spread in spreads],
                    [spread.half_width for spread in spreads],
                )
            title = f"{hidden} hidden layer{'s' if hidden > 1 else ''}"
            pictures.draw_lines(axes, series, title=title, xscale="log", xlabel="parameters", ylabel="accuracy, %")
            axes.minorticks_off()


def _ratio(size: Size | None, ours: Size | None, parameters: dict[Size, int]) -> float:
    return math.nan if size is None or ours is None else parameters[size] / parameters[ours]


def _number(ratio: float) -> str:
    return "none" if math.isnan(ratio) else f"{ratio:.2g}"


def _describe(size: Size | None, found: dict[Size, np.ndarray], parameters: dict[Size, int]) -> str:
    if size is None:
        return "none"
    method, layers, width = size
    return f"{method}, {layers} of {width}: {parameters[size]} parameters, {100 * found[size].mean():.2f} %"


def _range(ratios: Sequence[float]) -> str:
    finite = [ratio for ratio in ratios if not math.isnan(ratio)]
    if not finite:
        return "no match"
    low, high = np.percentile(finite, (2.5, 97.5))
    missed = 1 - len(finite) / len(ratios)
    return f"{low:.2g} to {high:.2g}" + (f"; none in {missed:.0%}" if missed else "")


def main() -> None:
    """Run the study."""
    parser = command.parser("volatility", __doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of MNIST's idx files (default: digits)")
    arguments = parser.parse_args()
    out = command.folder(arguments)
    with command.refusing(arguments):
        parts_of = splits(arguments.data)
    name = "digits" if arguments.data is None else "MNIST"
    steps = 30 if arguments.quick else Settings().steps
    shared = {"data": name, "steps": steps}

    runs, watched = configurations(arguments.quick), {**shared, "width": WIDTH, "window": WINDOW}
    rows = command.rows(arguments, "volatility", (KEYS, VALUES), watched, runs, lambda one: run(one, parts_of, steps))
    report(rows, out, name)

    runs = sized_configurations(arguments.quick)
    rows = command.rows(
        arguments, "parameters", (SIZED_KEYS, SIZED_VALUES), shared, runs, lambda one: run_sized(one, parts_of, steps)
    )
    report_sizes(rows, out, name)
    print(f"\nResults and pictures: {out}")


if __name__ == "__main__":
    main()

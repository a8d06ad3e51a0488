"""The pictures of the studies, in one style."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which remain apart for the colour-blind.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


@contextmanager
def figure(
    path: Path, title: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4.5)
) -> Iterator[Any]:
    """Axes to draw on, an array of them where there are several; written as PNG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        drawn.suptitle(title, fontsize=12)
        try:
            yield axes
            # Without matplotlib's version in it, the same picture is the same file.
            drawn.savefig(path, dpi=110, metadata={"Software": None})
        finally:
            plt.close(drawn)


Points = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""Places on the horizontal axis, means, and half widths of their intervals."""


def draw_lines(axes: Any, series: Mapping[str, Points], **labels: Any) -> None:
    """Lines with error bars; ``labels`` go to ``axes.set``."""
    for position, (name, (x, mean, half_width)) in enumerate(series.items()):
        axes.errorbar(
            x,
            mean,
            half_width,
            label=name,
            color=COLOURS[position % len(COLOURS)],
            marker=MARKERS[position % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
            capsize=2,
        )
    axes.set(**labels)
    axes.legend()


def draw_bars(
    axes: Any, values: Mapping[str, tuple[float, float]], highlighted: Sequence[str] = (), **labels: Any
) -> None:
    """Horizontal bars, mean and half width each, the first on top."""
    names = list(values)
    places = range(len(names) - 1, -1, -1)
    colours = [COLOURS[1] if name in highlighted else COLOURS[0] for name in names]
    means, half_widths = zip(*values.values(), strict=True)
    axes.barh(places, means, xerr=half_widths, color=colours, height=0.7, error_kw={"elinewidth": 1, "capsize": 2})
    axes.set_yticks(places, names)
    axes.grid(axis="y", visible=False)
    axes.set(**labels)


def draw_grid(
    axes: Any,
    values: Mapping[str, Mapping[str, float]],
    digits: int = 1,
    texts: Sequence[Sequence[str]] | None = None,
    **labels: Any,
) -> None:
    """A table of numbers on colours: rows by their names, then columns; ``texts`` in place of the numbers."""
    rows, columns = list(values), list(next(iter(values.values())))
    table = [[values[row][column] for column in columns] for row in rows]
    image = axes.imshow(table, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            text = f"{value:.{digits}f}" if texts is None else texts[y][x]
            # What is not a number has no colour.
            axes.text(x, y, text, ha="center", va="center", color="white" if value <= middle else "black")
    axes.set(**labels)

"""The demo's picture: the training curves, and where the time and the memory go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chainzrule_kernels.cli._demo_training import Result, Training

# Blue, orange and green of Okabe and Ito, which remain apart for the colour-blind.
_COLOURS = {"plain PyTorch": "#0072B2", "torch.compile": "#E69F00", "fused": "#009E73"}
# The curves lie on one another when all is well: wide and faint below, narrow and dashed above.
_LINES: dict[str, dict[str, Any]] = {
    "plain PyTorch": {"linewidth": 5.0, "alpha": 0.35},
    "torch.compile": {"linewidth": 2.4, "alpha": 0.9},
    "fused": {"linewidth": 1.4, "linestyle": (0, (4, 3))},
}


def draw(path: Path, runs: Sequence[Training], rows: Sequence[Result], steps_per_epoch: int, title: str) -> None:
    """Write the picture as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(run, row) for run, row in zip(runs, rows, strict=True) if row.failure is None]
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with plt.rc_context(style):
        figure, ((loss, accuracy), (times, memory)) = plt.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
        figure.suptitle(title, fontsize=13)
        for run, _ in shown:
            line = {"color": _COLOURS[run.name], "label": run.name, **_LINES[run.name]}
            loss.plot(range(1, len(run.losses) + 1), run.losses, **line)
            epochs = [steps_per_epoch * epoch for epoch in range(1, len(run.accuracies) + 1)]
            accuracy.plot(epochs, [100 * value for value in run.accuracies], **line)
        loss.set(title="Training loss, penalty included", xlabel="step", yscale="log")
        accuracy.set(title="Test accuracy", xlabel="step", ylabel="%")
        for axes in (loss, accuracy):
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        _draw_times(times, [row for _, row in shown])
        _draw_memory(memory, [row for _, row in shown])
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_times(axes: Any, rows: Sequence[Result]) -> None:
    medians = [row.ms_per_step or 0.0 for row in rows]
    quartiles = [row.ms_per_step_quartiles or (0.0, 0.0) for row in rows]
    whiskers = [
        [median - low for median, (low, _) in zip(medians, quartiles, strict=True)],
        [high - median for median, (_, high) in zip(medians, quartiles, strict=True)],
    ]
    names, colours = [row.name for row in rows], [_COLOURS[row.name] for row in rows]
    axes.barh(names, medians, xerr=whiskers, color=colours, error_kw={"capsize": 4, "elinewidth": 1.2, "alpha": 0.7})
    for position, (median, (_, high)) in enumerate(zip(medians, quartiles, strict=True)):
        axes.text(high, position, f"   {median:.2f} ms", va="center")
    axes.set(title="Time of a training step", xlabel="ms; the whiskers hold the middle half of the steps")
    axes.invert_yaxis()
    axes.margins(x=0.18)


def _draw_memory(axes: Any, rows: Sequence[Result]) -> None:
    sizes = [(row.saved_activation_bytes or 0) / 2**20 for row in rows]
    bars = axes.barh([row.name for row in rows], sizes, color=[_COLOURS[row.name] for row in rows])
    axes.bar_label(bars, [f"  {size:.2f} MiB" for size in sizes])
    axes.set(title="Memory kept for the backward pass", xlabel="MiB")
    axes.invert_yaxis()
    axes.margins(x=0.18)

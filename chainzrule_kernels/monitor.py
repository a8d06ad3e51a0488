r"""What the layer Jacobians do over a training run: a few numbers for each layer, every so many steps.

A :class:`JacobianMonitor` asks the regulariser for its report and hands the rows on: to the console, to a CSV file, to
TensorBoard, and to its own history, from which it draws the curves.
"""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from chainzrule_kernels.cli.output import print_table
from chainzrule_kernels.diagnostics import Table, format_cell
from chainzrule_kernels.dreg import DREG

__all__ = ["JacobianMonitor", "Measurement"]

QUANTITIES = ("mean", "p99", "tail_ratio", "nonlinearity")


@dataclass(frozen=True)
class Measurement:
    """One layer at one step: the per-sample Jacobian norm ``‖J‖_F`` (not squared) of the layer.

    Attributes:
        step: how often :meth:`JacobianMonitor.step` had been called.
        layer: its name, as in ``model.named_modules()``.
        mean: over the samples.
        p99: the 99th percentile.
        tail_ratio: ``p99 / mean``. Near 1 it also describes a layer that has become linear: see ``nonlinearity``.
        nonlinearity: ``E‖J - E J‖_F² / E‖J‖_F²``, between 0 (the layer acts linearly on these samples) and 1; None
            when the step was not given the model's inputs.
        strength: of the regulariser at that step.
    """

    step: int
    layer: str
    mean: float
    p99: float
    tail_ratio: float
    nonlinearity: float | None
    strength: float


_COLUMNS = tuple(field.name for field in fields(Measurement))


class JacobianMonitor:
    r"""Follows the layer Jacobians of a regularised model through its training.

    .. code-block:: python

        reg = ck.DREG(model)
        with ck.JacobianMonitor(reg, every=100, csv="jacobians.csv") as monitor:
            for x, target in data:
                ...
                reg.step()
                monitor.step(x)
        monitor.plot("jacobians.png")

    A regulariser of strength 0 serves to watch a model without regularising it.

    Args:
        reg: the regulariser of the model.
        every: measure at every so many steps.
        csv: a file that gets one line for each layer and measurement, with the columns of :class:`Measurement`; its
            folder is made if need be. A file that is there already is gone on with: its lines become the beginning of
            :attr:`history`, and steps count from its last one until :meth:`load_state_dict` says otherwise.
        tensorboard: a folder for event files, or a ``torch.utils.tensorboard.SummaryWriter``; its tags are
            ``jacobian/<layer>/<quantity>`` and ``jacobian/strength``.
        console: whether to print a table for each measurement.

    Where ``torch.distributed`` runs, every process must call :meth:`step`, since the pass that measures may need all of
    them; the figures are those of the process's own samples, and only the first process prints and writes.

    Attributes:
        history: every measurement, oldest first.

    Raises:
        TypeError, ValueError: for arguments out of range, and for a CSV file with other columns.
        ImportError: for ``tensorboard`` without the package tensorboard.
    """

    def __init__(
        self,
        reg: DREG,
        every: int = 100,
        *,
        csv: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | Any = None,
        console: bool = False,
    ) -> None:
        if not isinstance(reg, DREG):
            raise TypeError(f"reg: expected a chainzrule_kernels.DREG, got {type(reg).__name__}")
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every: expected an int, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        if not isinstance(console, bool):
            raise TypeError(f"console: expected True or False, got {type(console).__name__}")
        if csv is not None and not isinstance(csv, str | os.PathLike):
            raise TypeError(f"csv: expected a path, got {type(csv).__name__}")
        self.reg = reg
        self.every = every
        self.history: list[Measurement] = []
        self._writes = _is_first_process()
        self._console = console and self._writes
        self._file = None if csv is None or not self._writes else Path(csv)
        self._writer: Any = _writer(tensorboard) if self._writes else None
        self._owns_writer = self._writer is not tensorboard
        if self._file is not None:
            # Now, and not after the first hundred steps.
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self.history = _read(self._file) if self._file.exists() else []
        self._position = self.history[-1].step if self.history else 0

    def step(self, *inputs: Any, **options: Any) -> Table[Measurement] | None:
        """Count a training step, and measure if it is due.

        Args:
            *inputs: the model's arguments, for a pass of their own in evaluation mode and without gradients, made only
                when it is due, which measures the nonlinearity as well; or none, for the norms of the latest pass.
            **options: the model's keyword arguments, likewise.

        Returns:
            One row for each layer; None when no measurement was due.

        Raises:
            RuntimeError: without inputs, when the model has not run since the regulariser was attached.
        """
        self._position += 1
        if self._position % self.every:
            return None
        return self.measure(*inputs, **options)

    def measure(self, *inputs: Any, **options: Any) -> Table[Measurement]:
        """Measure now, whether or not it is due; arguments, result and errors as in :meth:`step`."""
        strength = self.reg.strength
        rows = Table(
            Measurement(self._position, row.name, row.mean, row.p99, row.tail_ratio, row.nonlinearity, strength)
            for row in self.reg.report(*inputs, **options)
        )
        self.history += rows
        if self._console:
            self._print(rows)
        if self._file is not None:
            _append(self._file, rows)
        if self._writer is not None:
            for row in rows:
                for quantity in QUANTITIES:
                    value = getattr(row, quantity)
                    if value is not None:
                        self._writer.add_scalar(f"jacobian/{row.layer}/{quantity}", value, row.step)
            self._writer.add_scalar("jacobian/strength", strength, self._position)
        return rows

    def _print(self, rows: Table[Measurement]) -> None:
        columns = ("layer", *QUANTITIES)
        cells = [[format_cell(getattr(row, name)) for name in columns] for row in rows]
        title = f"Layer Jacobian norms at step {self._position}, strength {self.reg.strength:.4g}"
        print_table(title, [name.replace("_", " ") for name in columns], cells)

    # ---- the curves -------------------------------------------------------------------------------------------------

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw mean, 99th percentile, tail ratio and nonlinearity of each layer over the steps.

        Args:
            path: of the picture; its ending gives the format, such as ``.png`` or ``.svg``.

        Returns:
            The path.

        Raises:
            ImportError: without the package matplotlib.
            ValueError: when nothing has been measured.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ImportError("JacobianMonitor.plot needs the package matplotlib: pip install matplotlib") from error
        if not self.history:
            raise ValueError("JacobianMonitor.plot: nothing has been measured yet")
        layers = list(dict.fromkeys(row.layer for row in self.history))
        columns = 1 + len(layers) // 31
        # Inches: the legend stands beside the curves, and names of layers may be long.
        width = 9.0 + columns * (0.5 + 0.07 * max(map(len, layers)))
        figure = Figure(figsize=(width, 6.5), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True).flatten()
        titles = ("mean norm", "99th percentile of the norm", "tail ratio (p99 / mean)", "nonlinearity")
        for quantity, title, axis in zip(QUANTITIES, titles, axes, strict=True):
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.3)
            for layer, (colour, style) in zip(layers, _looks(len(layers)), strict=True):
                rows = [row for row in self.history if row.layer == layer and getattr(row, quantity) is not None]
                values = [getattr(row, quantity) for row in rows]
                mark = "o" if len(rows) == 1 else None
                axis.plot([row.step for row in rows], values, color=colour, linestyle=style, marker=mark)
        axes[3].set_ylim(bottom=0.0)
        if all(row.nonlinearity is None for row in self.history):
            axes[3].text(0.5, 0.5, "not measured: give step() the inputs", ha="center", transform=axes[3].transAxes)
        for axis in axes[2:]:
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        lines = axes[0].get_lines()
        numbers = list(map(str, range(len(layers))))
        legend = figure.legend(lines, numbers, loc="outside right upper", title="layer", fontsize=8, ncols=columns)
        # Behind it, since matplotlib leaves labels that begin with an underscore out.
        for text, layer in zip(legend.get_texts(), layers, strict=True):
            text.set(text=layer, parse_math=False)
        figure.suptitle("Layer Jacobian norms per sample, $\\Vert J\\Vert_F$", x=0.01, ha="left")
        figure.savefig(path, dpi=120)
        return Path(path)

    # ---- its state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """How many steps have been counted."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position that :meth:`state_dict` returned.

        Measurements of later steps, which a run that is resumed from a checkpoint makes again, are taken out of the
        history and out of the CSV file.

        Raises:
            TypeError, ValueError: when ``state`` is not what :meth:`state_dict` returns.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state: expected what JacobianMonitor.state_dict() returns, got {type(state).__name__}")
        position = state.get("position")
        if set(state) != {"position"} or not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ValueError(f"state: expected the keys and values of JacobianMonitor.state_dict(), got {state!r}")
        self._position = position
        kept = [row for row in self.history if row.step <= position]
        if len(kept) < len(self.history):
            self.history = kept
            if self._file is not None:
                _rewrite(self._file, kept)

    def close(self) -> None:
        """Close the event files that the monitor opened. Everything else is written when it is measured."""
        if self._writer is not None and self._owns_writer:
            self._writer.close()

    def __enter__(self) -> JacobianMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"JacobianMonitor(every={self.every}, position={self._position}, measurements={len(self.history)})"


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _writer(tensorboard: Any) -> Any:
    """The caller's SummaryWriter, or one for the caller's folder."""
    if tensorboard is None or hasattr(tensorboard, "add_scalar"):
        return tensorboard
    if not isinstance(tensorboard, str | os.PathLike):
        expected = "a path or a torch.utils.tensorboard.SummaryWriter"
        raise TypeError(f"tensorboard: expected {expected}, got {type(tensorboard).__name__}")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard: writing event files needs the package tensorboard: pip install tensorboard"
        ) from error
    return SummaryWriter(os.fspath(tensorboard))


def _looks(count: int) -> list[tuple[Any, str]]:
    """A colour and a line style for each layer: a scale from the first layer to the last, told apart by styles too."""
    from matplotlib import colormaps

    scale = colormaps["viridis"]
    styles = ("-", "--", "-.", ":")
    return [(scale(0.9 * index / max(count - 1, 1)), styles[index % len(styles)]) for index in range(count)]


# ---- the CSV file ----------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[Measurement]:
    """The measurements of a file. A line that a process did not finish is cut off."""
    content = path.read_text(encoding="utf-8")
    complete = content[: content.rfind("\n") + 1]
    if len(complete) < len(content):
        _replace(path, complete)
    lines = list(csv.reader(io.StringIO(complete)))
    if not lines:
        return []
    if tuple(lines[0]) != _COLUMNS:
        expected = ",".join(_COLUMNS)
        raise ValueError(f"csv: expected a file with the columns {expected}, {path} has {','.join(lines[0])}")
    try:
        return [_measurement(line) for line in lines[1:]]
    except (ValueError, IndexError) as error:
        raise ValueError(f"csv: {path} has a line that is no measurement: {error}") from error


def _measurement(line: list[str]) -> Measurement:
    step, layer, mean, p99, ratio, nonlinearity, strength = line
    return Measurement(
        int(step),
        layer,
        float(mean),
        float(p99),
        float(ratio),
        float(nonlinearity) if nonlinearity else None,
        float(strength),
    )


def _append(path: Path, rows: Table[Measurement] | list[Measurement]) -> None:
    """Write the rows behind what is there, in one piece; the header first where nothing is."""
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write((_as_csv([_COLUMNS]) if is_new else "") + _rows_as_csv(rows))


def _rewrite(path: Path, rows: list[Measurement]) -> None:
    _replace(path, _as_csv([_COLUMNS]) + _rows_as_csv(rows))


def _rows_as_csv(rows: Table[Measurement] | list[Measurement]) -> str:
    return _as_csv([tuple(getattr(row, name) for name in _COLUMNS) for row in rows])


def _as_csv(lines: list[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _replace(path: Path, content: str) -> None:
    """Give a file another content, so that it has the old or the new one whatever happens meanwhile."""
    other = path.with_name(path.name + ".new")
    other.write_text(content, encoding="utf-8", newline="")
    other.replace(path)

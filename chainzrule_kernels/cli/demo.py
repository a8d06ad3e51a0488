"""``python -m chainzrule_kernels demo``: train one net three ways on real data, and compare.

The plain version is written out with powers, as one writes it without this package, rather than taken from
``chainzrule_kernels.reference``: so the comparison is with code that shares nothing with what it is compared to.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import chainzrule_kernels as ck
from chainzrule_kernels.cli.output import print_table

if TYPE_CHECKING:
    from chainzrule_kernels.cli._demo_training import Result

_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``."""
    parser.description = (
        "Train a ChainzRule net with DREG on scikit-learn's digits three times from one seed: plain PyTorch, "
        "torch.compile of it, and the fused kernels. Prints a table and draws a picture."
    )
    parser.add_argument("--epochs", type=_positive, default=60, help="passes over the training data (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters, the split and the batches (default: 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="for the picture (default: demo-output)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in the place of the table")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo. Exit status 1 when a package is missing; a torch.compile that fails is a row that says why."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"demo: needs {', '.join(missing)}, which the package does not install by itself: "
            "pip install 'chainzrule_kernels[demo]'",
            file=sys.stderr,
        )
        return 1

    from chainzrule_kernels.cli import _demo_training as training
    from chainzrule_kernels.cli._demo_picture import draw

    data = training.Data.load(arguments.seed)
    torch.manual_seed(arguments.seed)
    net = ck.nn.ChainzRuleNet(training.SIZES)
    runs, reg = training.trainings(net)
    served = ck.explain("polynomial_dreg", torch.empty(1, 1), torch.empty(4)).backend
    with _progress(arguments.epochs * data.steps_per_epoch) as (say, advance):
        x, y = next(data.batches(torch.Generator().manual_seed(arguments.seed)))
        for one in runs:
            say(f"warming up: {one.name}")
            one.warm_up(x, y)
        say("training")
        training.train(runs, data, arguments.epochs, arguments.seed, advance)
    rows = training.results(runs, data)

    arguments.output.mkdir(parents=True, exist_ok=True)
    picture = arguments.output / "digits.png"
    sizes = "-".join(str(size) for size in training.SIZES)
    title = f"Digits, ChainzRule net {sizes} with DREG, batch {training.BATCH}, {torch.get_num_threads()} CPU threads"
    draw(picture, runs, rows, data.steps_per_epoch, title)
    summary = {
        "sizes": training.SIZES,
        "batch": training.BATCH,
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "strength": training.STRENGTH,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "backend": served,
        "results": [training.as_dict(row) for row in rows],
        "picture": str(picture),
    }
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print(f"\n{title}\n{arguments.epochs} epochs, seed {arguments.seed}; the fused ops are served by: {served}\n")
        print_table("The three trainings", _COLUMNS, [_cells(row) for row in rows])
        for row in rows:
            if row.failure is not None:
                print(f"{row.name} did not run: {row.failure}")
        print(_LEGEND)
        print(f"\nThe fused net's layers on the test part:\n{reg.report(data.test_x)}")
        print(f"\nPicture: {picture}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


@contextmanager
def _progress(steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """``say`` what is going on, and ``advance`` a progress bar by a step; silent where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps)
        yield lambda text: progress.update(task, description=text), lambda: progress.advance(task)


# Short enough for a terminal of 80 columns.
_COLUMNS = ("training", "test %", "loss", "difference", "ms/step", "MiB", "tail ratio")
_LEGEND = """
test %: accuracy on the test part. loss: mean of the last epoch, penalty included. difference: the largest of any
parameter from that of plain PyTorch, after the training. ms/step: median of forward, backward and optimizer together;
the three take turns, step by step. MiB: what autograd keeps for the backward pass of one step, parameters apart.
tail ratio: p99 / mean, over the test part, of the root of the summed squared Jacobian norms of the layers."""


def _cells(row: Result) -> list[str]:
    if row.failure is not None:
        return [row.name, *["-"] * (len(_COLUMNS) - 1)]
    return [
        row.name,
        f"{100 * _present(row.test_accuracy):.2f}",
        f"{_present(row.final_loss):.5f}",
        f"{_present(row.largest_parameter_difference):.1e}",
        f"{_present(row.ms_per_step):.2f}",
        f"{_present(row.saved_activation_bytes) / 2**20:.2f}",
        f"{_present(row.tail_ratio):.3f}",
    ]


def _present(value: float | None) -> float:
    assert value is not None
    return value

"""How deep PolyKervNets train: python -m studies.polykervnet_depth

The claims of arXiv 2312.15229: PKN trains up to 18 layers, R-PKN up to 50, and distillation and MoMo help. ResNets of
10, 18, 34 and 50 layers on scikit-learn's digits, or on CIFAR-10 with --data. A run diverges when its loss or gradient
is not finite; it trains when it gets most of the training pictures right in its last epoch. Gradients are clipped in
one part of the runs only, since clipping hides a part of what is asked for.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.image_classification import data, training
from examples.image_classification.resnet import DEPTHS
from examples.image_classification.training import Divergence, Run, Settings
from studies import command, pictures
from studies.store import Row
from studies.training import Clock

KERNELS = {"relu": "ReLU", "pkn": "PKN", "rpkn": "R-PKN", "react": "ReactPKN"}
POLYNOMIALS = ("pkn", "rpkn", "react")
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "momo": "MoMo"}
RANDOM, TRAINED = "random", "ReLU-trained"
PUBLISHED_RATE = 3e-5
"""With which the published runs went on from weights that were trained with ReLU."""
TRAINS, DOES_NOT, DIVERGES = "trains", "does not train", "diverges"
MOST = 0.5
CLAIMED, CLAIMED_KERNELS = (18, 50), ("pkn", "rpkn")
"""The depths that the papers give as the limits of PKN and R-PKN."""
EPOCHS = 12
NEVER = 1 << 62

KEYS = {
    "kernel": str,
    "depth": int,
    "batch_norm": str,
    "start": str,
    "distillation": str,
    "optimizer": str,
    "learning_rate": float,
    "clip": float,
    "epochs": int,
    "seed": int,
}
VALUES = {
    "outcome": str,
    "diverged_at": float,
    "train_loss": float,
    "train_accuracy": float,
    "test_accuracy": float,
    "gradient_norm": float,
    "seconds": float,
    "process_seconds": float,
}


@dataclass(frozen=True)
class Shared:
    """What all runs share.

    Attributes:
        data: its name.
        width: channels of the first stage.
        batch: pictures of a step.
        first_epochs: of the ReLU net, Adam, whose weights others start from.
    """

    data: str
    width: int = 16
    batch: int = 64
    first_epochs: int = 6


def configurations(quick: bool) -> list[Row]:
    """All runs.

    Every kernel with every depth and optimizer. At the depths of the claims, with Adam: without batch norm, and
    distilled from the vanilla twin. The kernels that the claims are about there: with gradients clipped to 1 (a clip of
    0 is none); four times as long at the lower depth; and from the weights of a trained ReLU net at the published
    learning rate. Quick, the smallest depth and Adam.
    """
    depths = (min(DEPTHS),) if quick else tuple(DEPTHS)
    claimed = depths if quick else CLAIMED
    epochs = 1 if quick else EPOCHS
    optimizers = ("adam",) if quick else tuple(OPTIMIZERS)

    def row(kernel: str, depth: int, optimizer: str = "adam", **others: Any) -> Row:
        common = {
            "batch_norm": "yes",
            "start": RANDOM,
            "distillation": "none",
            "clip": 0.0,
            "epochs": epochs,
            "seed": 0,
        }
        rate = training.OPTIMIZERS[optimizer]
        values = {"kernel": kernel, "depth": depth, "optimizer": optimizer, "learning_rate": rate, **common, **others}
        return {name: values[name] for name in KEYS}

    return [
        *(row(kernel, depth, optimizer) for depth in depths for optimizer in optimizers for kernel in KERNELS),
        *(row(kernel, depth, batch_norm="no") for depth in claimed for kernel in KERNELS),
        *(row(kernel, depth, distillation="published") for depth in claimed for kernel in POLYNOMIALS),
        *(row(kernel, depth, clip=1.0) for depth in claimed for kernel in CLAIMED_KERNELS),
        *(row(kernel, claimed[0], clip=1.0, epochs=4 * epochs) for kernel in CLAIMED_KERNELS),
        *(row(k, depth, start=TRAINED, learning_rate=PUBLISHED_RATE) for depth in claimed for k in CLAIMED_KERNELS),
    ]


Weights = Callable[[int, int], Mapping[str, Tensor]]
"""From depth and seed to the ``state_dict`` of a trained ReLU net."""


def relu_weights(images: data.Images, shared: Shared) -> Weights:
    """Trained when they are first asked for."""

    @functools.cache
    def weights(depth: int, seed: int) -> Mapping[str, Tensor]:
        settings = Settings(
            depth, shared.width, "relu", epochs=shared.first_epochs, batch=shared.batch, clip=None, seed=seed
        )
        with tempfile.TemporaryDirectory() as folder:
            one = Run(settings, images, Path(folder), torch.device("cpu"))
            one.train(NEVER)
        return one.learners["student"].model.state_dict()

    return weights


def run(configuration: Row, images: data.Images, shared: Shared, weights: Weights) -> Row:
    """One training, to its end or to its divergence."""
    given = {name: configuration[name] for name in KEYS if name not in ("start", "batch_norm", "clip")}
    settings = Settings(
        **given,
        batch_norm=configuration["batch_norm"] == "yes",
        width=shared.width,
        batch=shared.batch,
        clip=configuration["clip"] or None,
    )
    start = weights(settings.depth, settings.seed) if configuration["start"] == TRAINED else None
    clock = Clock()
    diverged_at = None
    with tempfile.TemporaryDirectory() as folder:
        one = Run(settings, images, Path(folder), torch.device("cpu"), start)
        try:
            one.train(NEVER)
        except Divergence as divergence:
            diverged_at = divergence.step
    values = dict.fromkeys(VALUES, math.nan) | clock.read()
    if one.history:
        last = one.history[-1]
        values |= {
            "train_loss": last.train_loss,
            "train_accuracy": last.train_accuracy,
            "test_accuracy": last.test_accuracy,
            "gradient_norm": max(epoch.gradient_norm for epoch in one.history),
        }
    if diverged_at is not None:
        return {**values, "outcome": DIVERGES, "diverged_at": float(diverged_at)}
    return {**values, "outcome": TRAINS if values["train_accuracy"] > MOST else DOES_NOT}


# ---- what came out --------------------------------------------------------------------------------------------------


def setting(row: Row) -> str:
    """What a run has besides kernel and depth."""
    if row["start"] == TRAINED:
        return f"from ReLU's weights, Adam {PUBLISHED_RATE:g}"
    optimizer = OPTIMIZERS[row["optimizer"]]
    if row["distillation"] != "none":
        return f"{optimizer}, distilled"
    if row["clip"]:
        return f"{optimizer}, clipped" + (f", {row['epochs']} epochs" if row["epochs"] > EPOCHS else "")
    return optimizer if row["batch_norm"] == "yes" else f"{optimizer}, no batch norm"


def cell(row: Row) -> str:
    """The end of a run in a few characters."""
    if row["outcome"] == DIVERGES:
        return f"diverges, step {row['diverged_at']:.0f}"
    return f"{100 * row['train_accuracy']:.0f} / {100 * row['test_accuracy']:.0f}"


def report(rows: Sequence[Row], out: Path, shared: Shared) -> None:
    """Print the table and draw the picture."""
    depths = sorted({row["depth"] for row in rows})
    epochs = rows[0]["epochs"]
    table: dict[tuple[str, str], dict[int, Row]] = {}
    for kernel in KERNELS:
        for row in rows:
            if row["kernel"] == kernel:
                table.setdefault((KERNELS[kernel], setting(row)), {})[row["depth"]] = row
    cells = [[cell(of[depth]) if depth in of else "" for depth in depths] for of in table.values()]
    command.print_table(
        f"Accuracy in percent after {epochs} epochs, training / test, or the step of the divergence",
        ("net", "setting", *(f"{depth} layers" for depth in depths)),
        [[*key, *line] for key, line in zip(table, cells, strict=True)],
    )
    title = f"PolyKervNets on {shared.data}: accuracy after {epochs} epochs, training / test, %"
    with pictures.figure(out / "polykervnet_depth.png", title, size=(9, 0.32 * len(table) + 1.4)) as axes:
        pictures.draw_grid(
            axes,
            {
                ", ".join(key): {
                    f"{depth} layers": 100 * of[depth]["train_accuracy"] if depth in of else math.nan
                    for depth in depths
                }
                for key, of in table.items()
            },
            texts=cells,
        )


def main() -> None:
    """Run the study."""
    parser = command.parser("polykervnet_depth", __doc__)
    parser.add_argument("--data", type=Path, metavar="PATH", help="cifar-10-python.tar.gz (default: digits of 8x8)")
    parser.add_argument("--report", action="store_true", help="train nothing; print and draw the runs that are there")
    arguments = parser.parse_args()
    out = command.folder(arguments)
    with command.refusing(arguments):
        images = data.load(arguments.data, None, 0)
    shared = Shared(images.name, **({"width": 2, "batch": 512, "first_epochs": 1} if arguments.quick else {}))
    runs, weights = configurations(arguments.quick), relu_weights(images, shared)
    rows = command.rows(
        arguments,
        "polykervnet_depth",
        (KEYS, VALUES),
        vars(shared),
        runs,
        lambda one: run(one, images, shared, weights),
    )
    report(rows, out, shared)
    print(f"\nResults and pictures: {out}")


if __name__ == "__main__":
    main()

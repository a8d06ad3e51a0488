"""How deep PolyKervNets train: python -m studies.polykervnet_depth

The claims of arXiv 2312.15229: PKN trains up to 18 layers, R-PKN up to 50. ResNets of 10, 18, 34 and 50 layers on
scikit-learn's digits (CIFAR-10 with --data), with ReLU, PKN, R-PKN and ReactPKN; three optimizers, with distillation and
without; from random weights and from those of a trained ReLU net; without clipping the gradients, which would hide what
is asked for. A run diverges when its loss or gradient is not finite, and trains when in the last epoch it gets most
training pictures right.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.image_classification import data, training
from examples.image_classification.resnet import DEPTHS
from examples.image_classification.training import Divergence, Run
from studies import command, pictures
from studies.store import Row, Store
from studies.training import Clock

NAMES = {"relu": "ReLU", "pkn": "PKN", "rpkn": "R-PKN", "react": "ReactPKN"}
POLYNOMIALS = ("pkn", "rpkn", "react")
OPTIMIZERS = ("sgd", "adam", "momo")
RANDOM, TRAINED = "random", "ReLU-trained"
TRAINS, DOES_NOT, DIVERGES = "trains", "does not", "diverges"
MOST = 0.5

KEYS = {
    "kernel": str,
    "depth": int,
    "batch_norm": str,
    "start": str,
    "distillation": str,
    "optimizer": str,
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
SHARED = {"width": 8, "batch": 64, "epochs": 12, "epochs_from_trained": 6, "clip": None}
QUICK = {"width": 2, "batch": 256, "epochs": 1, "epochs_from_trained": 1}
QUICK_DEPTHS = (10,)


def configurations(quick: bool) -> list[Row]:
    """All runs: kernels by depths by optimizers by distillation, and smaller grids without batch norm and from ReLU."""
    depths = QUICK_DEPTHS if quick else tuple(DEPTHS)

    def row(kernel: str, depth: int, batch_norm: str, start: str, distillation: str, optimizer: str) -> Row:
        return dict(zip(KEYS, (kernel, depth, batch_norm, start, distillation, optimizer, 0), strict=True))

    runs = []
    for depth in depths:
        for optimizer in OPTIMIZERS:
            for distillation in ("none", "published"):
                kernels = POLYNOMIALS if distillation == "published" else tuple(NAMES)
                runs += [row(kernel, depth, "yes", RANDOM, distillation, optimizer) for kernel in kernels]
        runs += [row(kernel, depth, "no", RANDOM, "none", "adam") for kernel in NAMES]
        runs += [row(kernel, depth, "yes", TRAINED, "none", optimizer) for kernel in POLYNOMIALS for optimizer in OPTIMIZERS]
    return runs


def settings_of(configuration: Row, shared: Row) -> training.Settings:
    """The run as the training loop knows it."""
    names = ("kernel", "depth", "distillation", "optimizer", "seed")
    return training.Settings(
        **{name: configuration[name] for name in names},
        batch_norm=configuration["batch_norm"] == "yes",
        epochs=shared["epochs" if configuration["start"] == RANDOM else "epochs_from_trained"],
        width=shared["width"],
        batch=shared["batch"],
        clip=shared["clip"],
    )


def run(configuration: Row, images: data.Images, shared: Row, device: torch.device) -> Row:
    """One training, to its end or to its divergence."""
    clock = Clock()
    settings = settings_of(configuration, shared)
    weights = None
    if configuration["start"] == TRAINED:
        weights = relu_weights(images, dataclasses.replace(settings, kernel="relu", optimizer="adam"), device)
        clock = Clock()
    diverged_at = float("nan")
    with tempfile.TemporaryDirectory() as folder:
        one = Run(settings, images, Path(folder), device, weights)
        try:
            one.train(checkpoint_every=NEVER)
        except Divergence as divergence:
            diverged_at = divergence.step
    times = clock.read()
    last = one.history[-1] if one.history else None
    has_diverged = diverged_at == diverged_at
    trains = last is not None and last.train_accuracy > MOST
    nan = float("nan")
    return {
        "outcome": DIVERGES if has_diverged else TRAINS if trains else DOES_NOT,
        "diverged_at": diverged_at,
        "train_loss": nan if last is None else last.train_loss,
        "train_accuracy": nan if last is None else last.train_accuracy,
        "test_accuracy": nan if last is None else last.test_accuracy,
        "gradient_norm": max((epoch.gradient_norm for epoch in one.history), default=nan),
        **times,
    }

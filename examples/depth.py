"""How deep PolyKervNets go: python examples/depth.py

The papers say that PKN trains up to 18 layers and R-PKN up to 50. This script builds ResNets of 10, 18, 34 and 50
layers with either kernel, and with ReLU to compare, with their batch norms and without. Of each it takes one batch of
scikit-learn's digits, prints and draws the norm of the gradient at every convolution, writes them as CSV, and trains a
few steps. Needs scikit-learn and matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chainzrule_kernels as ck
from image_classification import data
from image_classification.resnet import DEPTHS, ResNet, without_batch_norm
from image_classification.training import write_atomically

KERNELS = ("relu", "pkn", "rpkn")
LEARNING_RATE = 1e-3
# Blue, orange and green of Okabe and Ito, which remain apart for the colour-blind.
COLOURS = {"relu": "#777777", "pkn": "#E69F00", "rpkn": "#0072B2"}
NAMES = {"relu": "ReLU", "pkn": "PKN", "rpkn": "R-PKN"}


@dataclass(frozen=True)
class Measurement:
    """What was seen of one net at its start, and while it was trained.

    Attributes:
        gradient_norms: of the weight of each convolution, from the input to the output.
        output: the largest absolute logit.
        losses: of the steps.
    """

    depth: int
    kernel: str
    has_batch_norm: bool
    layers: list[str]
    gradient_norms: list[float]
    output: float
    losses: list[float]

    @property
    def verdict(self) -> str:
        """In words."""
        if not all(map(math.isfinite, [self.output, *self.gradient_norms])):
            return "not finite"
        if not all(map(math.isfinite, self.losses)):
            return "diverges"
        return "learns" if self.losses[-1] < 0.9 * self.losses[0] else "does not learn"


def build(depth: int, kernel: str, has_batch_norm: bool, width: int, seed: int) -> nn.Module:
    """A ResNet for the digits."""
    torch.manual_seed(seed)
    model: nn.Module = ResNet(depth, in_channels=1, width=width)
    model = model if has_batch_norm else without_batch_norm(model)
    return model if kernel == "relu" else ck.to_polykervnet(model, kernel, inplace=True)


def measure(
    depth: int, kernel: str, has_batch_norm: bool, x: Tensor, y: Tensor, width: int = 16, steps: int = 20, seed: int = 0
) -> Measurement:
    """Gradient norms on a batch, and the losses of some steps of Adam with clipped gradients on that same batch."""
    model = build(depth, kernel, has_batch_norm, width, seed)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    losses: list[float] = []
    norms: list[float] = []
    output = math.nan
    for step in range(steps):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            output = logits.detach().abs().max().item()
            norms = [module.weight.grad.norm().item() for module in convolutions.values()]
        if not math.isfinite(losses[-1]):
            break
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Measurement(depth, kernel, has_batch_norm, list(convolutions), norms, output, losses)


def write_csv(path: Path, measurements: list[Measurement]) -> None:
    """One row for each convolution of each net."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["depth", "kernel", "batch_norm", "layer", "name", "gradient_norm"])
        for one in measurements:
            for number, (name, norm) in enumerate(zip(one.layers, one.gradient_norms, strict=True), 1):
                writer.writerow([one.depth, one.kernel, one.has_batch_norm, number, name, f"{norm:.6g}"])


def draw(path: Path, measurements: list[Measurement]) -> None:
    """The gradient norm over the layers, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths = sorted({one.depth for one in measurements})
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            2, len(depths), figsize=(3.4 * len(depths), 6.4), layout="constrained", sharey="row", squeeze=False
        )
        for row, has_batch_norm in enumerate((True, False)):
            for axes, depth in zip(grid[row], depths, strict=True):
                broken = []
                for one in measurements:
                    if (one.depth, one.has_batch_norm) != (depth, has_batch_norm):
                        continue
                    if all(map(math.isfinite, one.gradient_norms)):
                        numbers = range(1, len(one.layers) + 1)
                        axes.plot(numbers, one.gradient_norms, color=COLOURS[one.kernel], label=NAMES[one.kernel])
                    else:
                        broken.append(NAMES[one.kernel])
                if broken:
                    axes.text(
                        0.5, 0.72, f"{', '.join(broken)}: not finite", ha="center", transform=axes.transAxes,
                        color=COLOURS["pkn"],
                    )  # fmt: skip
                axes.set(yscale="log", title=f"{depth} layers, {'' if has_batch_norm else 'no '}batch norm")
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.grid(alpha=0.25)
            grid[row][0].set_ylabel("gradient norm at the start")
        for axes in grid[1]:
            axes.set_xlabel("convolution, from the input on")
        grid[0][0].legend(frameon=False)
        write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=150, format="png"))
        plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Gradient norms of PolyKervNets over their layers.")
    parser.add_argument("--depths", type=int, nargs="+", choices=tuple(DEPTHS), default=list(DEPTHS))
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage (default: 16)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="of training (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("depth-output"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    digits = data.digits(options.image_size, options.seed)
    x = digits.prepared(digits.train_x[: options.batch], torch.device("cpu"))
    y = digits.train_y[: options.batch]
    measurements = []
    print("depth  kernel  batch norm  largest logit  gradient: first  last      loss: first  last      verdict")
    for has_batch_norm in (True, False):
        for depth in options.depths:
            for kernel in KERNELS:
                one = measure(depth, kernel, has_batch_norm, x, y, options.width, options.steps, options.seed)
                measurements.append(one)
                print(
                    f"{depth:5}  {NAMES[kernel]:6}  {'yes' if has_batch_norm else 'no':10}  {one.output:13.3g}  "
                    f"{one.gradient_norms[0]:15.3g}  {one.gradient_norms[-1]:8.3g}  {one.losses[0]:11.3g}  "
                    f"{one.losses[-1]:8.3g}  {one.verdict}",
                    flush=True,
                )
    write_csv(options.output / "gradient-norms.csv", measurements)
    draw(options.output / "gradient-norms.png", measurements)
    print(f"Every layer: {options.output / 'gradient-norms.csv'}, drawn: {options.output / 'gradient-norms.png'}")


if __name__ == "__main__":
    main()

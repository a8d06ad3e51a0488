"""Training that can be interrupted at any moment and goes on as if it had not been.

Everything random is drawn from a generator seeded by the run's seed and the position in it, so that a checkpoint needs
only the position; what the global generator gives (a model may use dropout) is kept beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chainzrule_kernels as ck

from .data import Images, augmented
from .resnet import ResNet, without_batch_norm

KERNELS = ("rpkn", "pkn", "kerv", "react", "act", "relu")
OPTIMIZERS = {"sgd": 0.05, "adam": 1e-3, "momo": 1.0, "momo-adam": 1e-2}
"""The optimizers, each with its learning rate; MoMo's (arXiv 2305.07583) is an upper bound that it seldom reaches."""
DISTILLATIONS = ("none", "published", "soft")
CHECKPOINT = "checkpoint.pt"
HISTORY = "history.json"
# What MoMo's state_dict leaves out.
_MOMO_ATTRIBUTES = ("_number_steps", "loss_avg", "lb")


@dataclass(frozen=True)
class Settings:
    """What determines a run, apart from the data."""

    depth: int = 10
    width: int = 64
    kernel: str = "rpkn"
    batch_norm: bool = True
    epochs: int = 20
    batch: int = 128
    optimizer: str = "adam"
    learning_rate: float | None = None
    weight_decay: float = 0.0
    clip: float | None = 1.0
    layer_decay: float = 1.0
    polynomial_factor: float = 1.0
    distillation: str = "none"
    temperature: float = 5.0
    soft_share: float = 0.9
    augment: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what argparse does not."""
        if self.optimizer.startswith("momo") and (self.layer_decay != 1.0 or self.polynomial_factor != 1.0):
            raise ValueError(
                f"optimizer: {self.optimizer} computes one step for all parameters, so that it takes neither a "
                "layer_decay nor a polynomial_factor"
            )
        if self.distillation != "none" and self.kernel == "relu":
            raise ValueError("distillation: the vanilla net is its own twin; choose another kernel than relu")


@dataclass(frozen=True)
class Epoch:
    """One row of the history.

    Losses are means over the epoch; the gradient norm is that before clipping, its largest.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    gradient_norm: float
    teacher_test_accuracy: float | None = None

    def as_json(self) -> dict[str, float | None]:
        """JSON has no number for what is not finite."""
        values = dataclasses.asdict(self)
        return {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}


class Divergence(RuntimeError):
    """The loss or its gradient is no longer finite.

    Attributes:
        step: at which it was found, 1 for the first.
    """

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"the {what} is {value} at step {step}")
        self.step = step


class Learner:
    """A model with its optimizer."""

    def __init__(self, model: nn.Module, settings: Settings, steps: int) -> None:
        self.model = model
        self.settings = settings
        self.steps = steps
        self.optimizer = make_optimizer(model, settings)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, loss: Tensor, position: int) -> float:
        """One step of the optimizer; the norm of the gradient before it was clipped.

        Raises:
            Divergence: when loss or norm is not finite; the model is then that before the step.
        """
        if not math.isfinite(loss.item()):
            raise Divergence("loss", loss.item(), position + 1)
        if not self.settings.optimizer.startswith("momo"):  # which finds the size of its steps itself
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * position / self.steps))
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [value for value in self.model.parameters() if value.grad is not None]
        norm = nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
        if not math.isfinite(norm.item()):
            raise Divergence("gradient's norm", norm.item(), position + 1)
        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        if self.settings.optimizer.startswith("momo"):
            self.optimizer.step(loss=loss)  # type: ignore[call-overload]  # MoMo's own argument
        else:
            self.optimizer.step()
        return norm.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the settings."""
        momo = {name: getattr(self.optimizer, name) for name in _MOMO_ATTRIBUTES if hasattr(self.optimizer, name)}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "momo": momo}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["momo"].items():
            setattr(self.optimizer, name, value)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer, with a learning rate for each group of parameters."""
    rate = OPTIMIZERS[settings.optimizer] if settings.learning_rate is None else settings.learning_rate
    groups = parameter_groups(model, rate, settings.layer_decay, settings.polynomial_factor)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, rate, momentum=0.9, weight_decay=settings.weight_decay)
    if settings.optimizer == "adam":
        return torch.optim.AdamW(groups, rate, weight_decay=settings.weight_decay)
    try:
        import momo
    except ImportError as error:
        raise ValueError(f"optimizer: {settings.optimizer} needs pip install momo-opt") from error
    build = momo.Momo if settings.optimizer == "momo" else momo.MomoAdam
    return build(model.parameters(), lr=rate, weight_decay=settings.weight_decay)


def parameter_groups(
    model: nn.Module, rate: float, layer_decay: float, polynomial_factor: float
) -> list[dict[str, Any]]:
    """Groups of parameters with their learning rates.

    Args:
        model: its convolutions and linear layers, in the order in which they were made, are the layers; what stands
            behind one belongs to it.
        rate: of the last layer.
        layer_decay: by which it is multiplied for each layer further from the output.
        polynomial_factor: by which that of the parameters of polynomials is multiplied in addition.
    """
    weighted = (nn.modules.conv._ConvNd, nn.Linear)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    layer = -1
    for module in model.modules():
        layer += isinstance(module, weighted)
        for name, parameter in module.named_parameters(recurse=False):
            is_polynomial = not isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in ("weight", "bias")
            groups.setdefault((max(layer, 0), is_polynomial), []).append(parameter)
    if layer_decay == 1.0:
        merged: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for (_, is_polynomial), parameters in groups.items():
            # Without a factor there is one group, which is what most optimizers are fastest with.
            merged.setdefault((layer, is_polynomial and polynomial_factor != 1.0), []).extend(parameters)
        groups = merged
    return [
        {
            "params": parameters,
            "lr": rate * layer_decay ** (layer - position) * (polynomial_factor if is_polynomial else 1.0),
        }
        for (position, is_polynomial), parameters in groups.items()
    ]


def student_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, settings: Settings) -> Tensor:
    """The loss of the net that is trained.

    ``published``: ``KL(softmax(t / T) ‖ softmax(s))``, as in the code of PolyKervNets, where T = 5 softens the teacher
    alone. ``soft``: the usual ``α T² KL(softmax(t / T) ‖ softmax(s / T)) + (1 - α) CE`` (arXiv 1503.02531).
    """
    if teacher_logits is None:
        return F.cross_entropy(logits, labels)
    temperature = settings.temperature
    target = F.softmax(teacher_logits / temperature, 1)
    if settings.distillation == "published":
        return F.kl_div(F.log_softmax(logits, 1), target, reduction="batchmean")
    soft = F.kl_div(F.log_softmax(logits / temperature, 1), target, reduction="batchmean") * temperature**2
    return settings.soft_share * soft + (1 - settings.soft_share) * F.cross_entropy(logits, labels)


def make_model(
    settings: Settings, data: Images, weights: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, nn.Module]:
    """The net to train and its vanilla twin, from the same weights.

    Args:
        settings: of the run.
        data: for the number of colours and classes.
        weights: a ``state_dict`` of the vanilla net; None for random ones.
    """
    torch.manual_seed(settings.seed)
    twin: nn.Module = ResNet(settings.depth, len(data.classes), data.channels, settings.width)
    if not settings.batch_norm:
        without_batch_norm(twin)
    if weights is not None:
        twin.load_state_dict(weights)
    model = twin if settings.kernel == "relu" else ck.to_polykervnet(twin, settings.kernel)
    return model, twin


class Run:
    """One training: what it knows, where it stands, and how it goes on.

    Args:
        settings: of the run.
        data: to learn.
        output: a folder for checkpoint and history.
        device: to train on.
        weights: of the vanilla net, to start from in place of random ones.
    """

    def __init__(
        self,
        settings: Settings,
        data: Images,
        output: Path,
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.settings = settings
        self.data = data
        self.output = output
        self.device = device
        self.steps_per_epoch = -(-len(data.train_y) // settings.batch)
        model, twin = make_model(settings, data, weights)
        steps = self.steps_per_epoch * settings.epochs
        self.learners = {"student": self._learner(model, steps)}
        if settings.distillation != "none":
            self.learners["teacher"] = self._learner(twin, steps)
        self.position = 0
        self.sums = [0.0, 0.0, 0.0]  # of the epoch so far: loss, right answers; and the largest gradient norm
        self.history: list[Epoch] = []

    def _learner(self, model: nn.Module, steps: int) -> Learner:
        model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not annotated
        return Learner(model, self.settings, steps)

    def train(self, checkpoint_every: int | None = None, advance: Callable[[str], None] = lambda text: None) -> None:
        """Train to the end.

        Args:
            checkpoint_every: the number of steps between checkpoints; None for one at the end of each epoch.
            advance: is called after each step with what to show.

        Raises:
            Divergence: when a loss or a gradient is not finite; the latest checkpoint is from before that.
        """
        while self.position < self.steps_per_epoch * self.settings.epochs:
            epoch, first = divmod(self.position, self.steps_per_epoch)
            for chosen in self._order(epoch).split(self.settings.batch)[first:]:
                self._step(chosen)
                if self.position % self.steps_per_epoch == 0:
                    self._finish_epoch()
                if self.position % (checkpoint_every or self.steps_per_epoch) == 0:
                    self.save()
                advance(f"epoch {epoch + 1} of {self.settings.epochs}, {self._standing()}")
        self.save()

    def _standing(self) -> str:
        return f"test accuracy {self.history[-1].test_accuracy:.1%}" if self.history else "no epoch finished yet"

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.data.train_y), generator=self._generator(2 * epoch))

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.settings.seed << 32) + number)

    def _step(self, chosen: Tensor) -> None:
        pictures = self.data.train_x[chosen]
        if self.settings.augment:
            pictures = augmented(pictures, self._generator(2 * self.position + 1))
        x = self.data.prepared(pictures, self.device)
        y = self.data.train_y[chosen].to(self.device)
        teacher_logits = self._teach(x, y)
        student = self.learners["student"]
        logits = student.model(x)
        loss = student_loss(logits, y, teacher_logits, self.settings)
        norm = student.step(loss, self.position)
        self.sums[0] += loss.item() * len(y)
        self.sums[1] += (logits.argmax(1) == y).sum().item()
        self.sums[2] = max(self.sums[2], norm)
        self.position += 1

    def _teach(self, x: Tensor, y: Tensor) -> Tensor | None:
        """A step of the teacher, which is trained along as published, and what it says afterwards."""
        teacher = self.learners.get("teacher")
        if teacher is None:
            return None
        teacher.step(F.cross_entropy(teacher.model(x), y), self.position)
        with torch.no_grad():
            return teacher.model(x)

    def _finish_epoch(self) -> None:
        count = len(self.data.train_y)
        loss, accuracy = self.evaluate("student")
        teacher = self.evaluate("teacher")[1] if "teacher" in self.learners else None
        epoch = self.position // self.steps_per_epoch
        self.history.append(
            Epoch(epoch, self.sums[0] / count, self.sums[1] / count, loss, accuracy, self.sums[2], teacher)
        )
        self.sums = [0.0, 0.0, 0.0]
        write_atomically(
            self.output / HISTORY,
            lambda path: path.write_text(json.dumps([row.as_json() for row in self.history], indent=1)),
        )

    def evaluate(self, who: str) -> tuple[float, float]:
        """Loss and accuracy on the test part, in evaluation mode."""
        model = self.learners[who].model.eval()
        loss = right = 0.0
        with torch.no_grad():
            for x, y in zip(self.data.test_x.split(256), self.data.test_y.split(256), strict=True):
                logits = model(self.data.prepared(x, self.device))
                loss += F.cross_entropy(logits, y.to(self.device), reduction="sum").item()
                right += (logits.argmax(1) == y.to(self.device)).sum().item()
        model.train()
        return loss / len(self.data.test_y), right / len(self.data.test_y)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint; whoever is killed meanwhile leaves the one before."""
        state = {
            "settings": dataclasses.asdict(self.settings),
            "data": self.data.name,
            "position": self.position,
            "sums": self.sums,
            "history": [dataclasses.asdict(row) for row in self.history],
            "random": torch.get_rng_state(),
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
        }
        write_atomically(self.output / CHECKPOINT, lambda path: torch.save(state, path))

    def resume(self) -> None:
        """Go on from the checkpoint.

        Raises:
            ValueError: when it belongs to other settings or other data.
        """
        state = torch.load(self.output / CHECKPOINT, map_location=self.device, weights_only=True)
        mine, theirs = dataclasses.asdict(self.settings), state["settings"]
        different = [
            f"{name} is {mine[name]}, was {theirs.get(name)}" for name in mine if mine[name] != theirs.get(name)
        ]
        if self.data.name != state["data"]:
            different.append(f"data is {self.data.name}, was {state['data']}")
        if different:
            raise ValueError(f"resume: the checkpoint in {self.output} is of another run: {'; '.join(different)}")
        self.position, self.sums = state["position"], state["sums"]
        self.history = [Epoch(**row) for row in state["history"]]
        for name, learner in self.learners.items():
            learner.load_state_dict(state["learners"][name])
        torch.set_rng_state(state["random"].cpu())


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is at any moment either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    write(unfinished)
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


@contextmanager
def progress(total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A function to call after each step with what to show: a bar on a terminal, a line a minute elsewhere."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is not None and console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total, completed=done)
            yield lambda text: bar.update(task, advance=1, description=text)
        return
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 60:
            last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    yield say


def draw(path: Path, history: Iterable[Epoch], title: str) -> None:
    """The curves of a run as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(history)
    epochs = [row.epoch for row in rows]
    # Blue and orange of Okabe and Ito, which remain apart for the colour-blind; grey for the teacher.
    training, test, teacher = "#0072B2", "#E69F00", "#777777"
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    marker = "o" if len(rows) <= 30 else None
    with plt.rc_context(style):
        figure, (loss, accuracy, gradient) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
        figure.suptitle(title, fontsize=12)
        loss.plot(epochs, [row.train_loss for row in rows], color=training, marker=marker, label="training")
        loss.plot(epochs, [row.test_loss for row in rows], color=test, marker=marker, label="test, cross entropy")
        if overflown := [row.epoch for row in rows if not math.isfinite(row.test_loss)]:
            top = loss.get_xaxis_transform()  # epochs to the right; upwards, parts of the height
            loss.plot(overflown, [1.0] * len(overflown), "x", color=test, transform=top, label="test, not finite")
        accuracy.plot(
            epochs, [100 * row.train_accuracy for row in rows], color=training, marker=marker, label="training"
        )
        accuracy.plot(epochs, [100 * row.test_accuracy for row in rows], color=test, marker=marker, label="test")
        if any(row.teacher_test_accuracy is not None for row in rows):
            values = [100 * (row.teacher_test_accuracy or 0.0) for row in rows]
            accuracy.plot(epochs, values, color=teacher, linestyle="--", label="teacher, test")
        gradient.plot(epochs, [row.gradient_norm for row in rows], color=training, marker=marker)
        loss.set(title="Loss", xlabel="epoch", yscale="log")
        accuracy.set(title="Accuracy", xlabel="epoch", ylabel="%")
        gradient.set(title="Largest gradient norm before clipping", xlabel="epoch", yscale="log")
        for axes in (loss, accuracy, gradient):
            axes.grid(alpha=0.25)
            axes.xaxis.get_major_locator().set_params(integer=True)
        loss.legend(frameon=False)
        accuracy.legend(frameon=False)
        write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=150, format="png"))
        plt.close(figure)

"""Train a PolyKervNet: python examples/polykervnet.py --quick

A ResNet of 10, 18, 34 or 50 layers for small pictures, its convolutions or activations replaced by polynomial kernels.
Without --data it learns scikit-learn's digits. An interrupted run goes on with --resume and ends where it would have.

Needs scikit-learn for the digits, Pillow for a folder of pictures, matplotlib for the curves, momo-opt for MoMo:
pip install 'chainzrule_kernels[examples]'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import chainzrule_kernels as ck
from image_classification import data, training
from image_classification.resnet import DEPTHS
from image_classification.training import Run, Settings

QUICK = {"depth": 10, "width": 16, "epochs": 30, "batch": 64}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(description="Train a PolyKervNet on pictures.")
    add = parser.add_argument
    add("--data", type=Path, help="cifar-10-python.tar.gz, or a folder of pictures (default: scikit-learn's digits)")
    add("--image-size", type=int, help="of the square pictures (default: 8 for the digits, 32 otherwise)")
    add("--output", type=Path, default=Path("polykervnet-output"), help="for checkpoint, history and curves")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    add("--checkpoint-every", type=int, metavar="STEPS", help="(default: at the end of each epoch)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help=f"{', '.join(f'{name} {value}' for name, value in QUICK.items())}")
    add("--depth", type=int, choices=tuple(DEPTHS), help=f"(default: {default.depth})")
    add("--width", type=int, help=f"channels of the first stage (default: {default.width})")
    add("--kernel", choices=training.KERNELS, default=default.kernel, help="relu is the vanilla net (default: rpkn)")
    add("--no-batch-norm", dest="batch_norm", action="store_false", help="the net without its batch norms")
    add("--epochs", type=int, help=f"(default: {default.epochs})")
    add("--batch", type=int, help=f"(default: {default.batch})")
    add("--optimizer", choices=tuple(training.OPTIMIZERS), default=default.optimizer, help="(default: adam)")
    add("--learning-rate", type=float, help=f"(defaults: {training.OPTIMIZERS})")
    add("--weight-decay", type=float, default=default.weight_decay)
    add("--clip", type=float, default=default.clip, help="largest norm of the gradient, 0 for any (default: 1)")
    add("--layer-decay", type=float, default=default.layer_decay, help="factor on the learning rate, layer by layer")
    add("--polynomial-factor", type=float, default=default.polynomial_factor, help="on that of the polynomials")
    add("--distillation", choices=training.DISTILLATIONS, default=default.distillation, help="from the vanilla twin")
    add("--temperature", type=float, default=default.temperature, help="of the teacher (default: 5)")
    add("--soft-share", type=float, default=default.soft_share, help="of the teacher in the soft loss (default: 0.9)")
    add("--augment", action="store_true", help="shift and mirror the pictures; not for digits")
    add("--seed", type=int, default=default.seed)
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """What was asked for, then what --quick says, then the defaults."""
    values = {name: getattr(options, name) for name in vars(Settings())}
    quick = QUICK if options.quick else {}
    for name, value in values.items():
        if value is None:
            values[name] = quick.get(name, getattr(Settings(), name))
    return Settings(**{**values, "clip": values["clip"] or None})


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        settings = settings_of(options)
        if (options.output / training.CHECKPOINT).exists() != options.resume:
            print(
                f"polykervnet: there is {'no' if options.resume else 'a'} checkpoint in {options.output}; "
                f"{'leave out' if options.resume else 'pass'} --resume, or choose another --output",
                file=sys.stderr,
            )
            return 2
        images = data.load(options.data, options.image_size, settings.seed)
        run = Run(settings, images, options.output, torch.device(options.device))
        if options.resume:
            run.resume()
    except (ValueError, OSError, ImportError) as error:
        print(f"polykervnet: {error}", file=sys.stderr)
        return 2
    title = (
        f"ResNet-{settings.depth} of width {settings.width}, {settings.kernel}, on {images.name} "
        f"({images.train_x.shape[-1]}x{images.train_x.shape[-1]}, {len(images.train_y)} pictures)"
    )
    print(title)
    if settings.kernel != "relu" and not options.resume:
        changed = ck.polykervnet_report(run.learners["student"].model)
        print(f"{sum(row.became is not None for row in changed)} of its modules were replaced")
    try:
        with training.progress(run.steps_per_epoch * settings.epochs, run.position) as advance:
            run.train(options.checkpoint_every, advance)
    except training.Divergence as error:
        print(f"polykervnet: {error}. Try a smaller --clip or --learning-rate", file=sys.stderr)
        return 1
    for row in run.history:
        teacher = "" if row.teacher_test_accuracy is None else f", teacher {row.teacher_test_accuracy:.2%}"
        print(
            f"epoch {row.epoch}: loss {row.train_loss:.4f}, test accuracy {row.test_accuracy:.2%}{teacher}, "
            f"largest gradient norm {row.gradient_norm:.3g}"
        )
    training.draw(options.output / "curves.png", run.history, title)
    print(f"Curves: {options.output / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

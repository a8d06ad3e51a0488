"""The examples on images: their data, their training, and that a killed run goes on as if it had not been."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import depth
import polykervnet
from image_classification import data, training
from image_classification.resnet import ResNet
from image_classification.training import Run, Settings

ROOT = Path(__file__).parent.parent
TINY = Settings(depth=10, width=2, kernel="react", epochs=2, batch=512)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> data.Images:
    return data.digits(8, 0)


def trained(settings: Settings, images: data.Images, folder: Path) -> Run:
    run = Run(settings, images, folder, CPU)
    run.train()
    return run


def test_digits_are_split_and_prepared(digits):
    assert (len(digits.train_y), len(digits.test_y)) == (1438, 359)
    prepared = digits.prepared(digits.train_x, CPU)
    assert prepared.is_contiguous(memory_format=torch.channels_last)
    assert prepared.mean().abs() < 1e-5
    assert abs(prepared.std().item() - 1) < 1e-3
    assert data.digits(32, 0).train_x.shape == (1438, 1, 32, 32)
    assert not torch.equal(data.digits(8, 1).train_y, digits.train_y)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_archive(tmp_path, packed):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = numpy.arange(2 * 3072, dtype=numpy.uint8).reshape(2, 3072)
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [3, 9]}, protocol=2))
    path = folder
    if packed:
        path = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, folder.name)
    images = data.load(path, None, 0)
    assert images.name == "CIFAR-10"
    assert images.train_y.tolist() == [3, 9, 3, 9]
    assert torch.equal(images.test_x, torch.from_numpy(pixels).view(2, 3, 32, 32))
    assert data.load(tmp_path if not packed else path, 16, 0).test_x.shape == (2, 3, 16, 16)


def test_cifar_archive_with_code_in_it_is_refused(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Path("/")))
    (tmp_path / "test_batch").write_bytes(b"")
    with pytest.raises(pickle.UnpicklingError, match="expected arrays"):
        data.load(tmp_path, None, 0)


def test_folder_of_pictures(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads pictures, and is not installed")
    colours = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    for part in ("train", "val"):
        for name, colour in colours.items():
            (tmp_path / part / name).mkdir(parents=True)
            image.new("RGB", (20, 10), colour).save(tmp_path / part / name / "picture.png")
    images = data.load(tmp_path, 6, 0)
    assert images.classes == ("blue", "red")
    assert images.train_x.shape == (2, 3, 6, 6)
    assert images.test_x[1, :, 2, 3].tolist() == [255, 0, 0]
    assert images.test_y.tolist() == [0, 1]
    split = data.load(tmp_path / "train", 6, 0)
    assert len(split.train_y) + len(split.test_y) == 2
    with pytest.raises(ValueError, match="expected a subfolder of pictures for each class"):
        data.load(tmp_path / "train" / "red", 6, 0)


def test_augmentation_shifts_and_mirrors():
    pictures = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(50, 2, 8, 8)
    found = data.augmented(pictures, torch.Generator().manual_seed(0))
    assert found.shape == pictures.shape
    assert torch.equal(found[:, 0], found[:, 1])
    padded = F.pad(pictures[0, 0], [4] * 4)
    windows = [padded[i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
    windows += [window.flip(1) for window in windows]
    assert all(any(torch.equal(picture, window) for window in windows) for picture in found[:, 0])
    assert len(found.unique(dim=0)) > 20


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_to_the_same_end(optimizer, digits, tmp_path):
    if optimizer.startswith("momo"):
        pytest.importorskip("momo", reason="momo-opt is not installed")
    settings = replace(TINY, optimizer=optimizer, epochs=3)
    whole = trained(settings, digits, tmp_path / "whole")
    assert whole.history[-1].train_loss < whole.history[0].train_loss
    first = Run(settings, digits, tmp_path / "parts", CPU)

    def stop_in_the_second_epoch(text: str) -> None:
        if first.position == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(checkpoint_every=2, advance=stop_in_the_second_epoch)
    second = Run(settings, digits, tmp_path / "parts", CPU)
    second.resume()
    assert second.position == 4
    second.train()
    assert repr(second.history) == repr(whole.history)  # in which NaN equals NaN
    theirs = whole.learners["student"].model.state_dict()
    assert all(
        torch.equal(value, theirs[name]) for name, value in second.learners["student"].model.state_dict().items()
    )


@pytest.mark.parametrize("distillation", ["published", "soft"])
def test_distillation_trains_student_and_teacher(distillation, digits, tmp_path):
    settings = replace(TINY, width=4, epochs=3, batch=128, learning_rate=0.01, distillation=distillation)
    run = trained(settings, digits, tmp_path)
    # A tenth by guessing. The loss says less: it may grow while the teacher becomes surer.
    assert run.history[-1].train_accuracy > 0.5
    assert run.history[-1].teacher_test_accuracy > 0.5


def test_losses_of_the_student():
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64).unbind(0)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])

    def divergence(target, prediction):
        return (target * (target.log() - prediction.log())).sum(1).mean()

    published = training.student_loss(
        student, labels, teacher, replace(TINY, distillation="published", temperature=5.0)
    )
    torch.testing.assert_close(published, divergence((teacher / 5).softmax(1), student.softmax(1)))
    soft = training.student_loss(student, labels, teacher, replace(TINY, distillation="soft", temperature=3.0))
    expected = 0.9 * 9 * divergence((teacher / 3).softmax(1), (student / 3).softmax(1))
    torch.testing.assert_close(soft, expected + 0.1 * F.cross_entropy(student, labels))


def test_learning_rates_by_layer():
    model, _ = training.make_model(replace(TINY, kernel="rpkn"), data.digits(8, 0))
    groups = training.parameter_groups(model, 1.0, 0.5, 0.1)
    of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert len(of) == len(list(model.parameters()))
    assert of[id(model.fc.weight)] == 1.0
    assert of[id(model.conv1.weight)] == 0.5 ** (count_of_layers(model) - 1)
    assert math.isclose(of[id(model.conv1.log_a)], 0.1 * of[id(model.conv1.weight)])
    assert of[id(model.bn1.weight)] == of[id(model.conv1.weight)]
    assert len(training.parameter_groups(model, 1.0, 1.0, 1.0)) == 1
    with pytest.raises(ValueError, match="optimizer: momo computes one step"):
        replace(TINY, optimizer="momo", layer_decay=0.5)


def count_of_layers(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())


def test_resume_refuses_another_run(digits, tmp_path):
    trained(replace(TINY, epochs=1), digits, tmp_path)
    with pytest.raises(ValueError, match=r"another run: depth is 18, was 10; data is other, was digits"):
        Run(replace(TINY, epochs=1, depth=18), replace(digits, name="other"), tmp_path, CPU).resume()


def test_a_file_is_old_or_new_but_never_half(tmp_path):
    path = tmp_path / "file"
    training.write_atomically(path, lambda unfinished: unfinished.write_text("old"))

    def interrupted(unfinished: Path) -> None:
        unfinished.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.write_atomically(path, interrupted)
    assert path.read_text() == "old"


def test_script_goes_on_after_kill_and_ends_as_one_that_was_not_interrupted(tmp_path, digits, threads):
    options = ["--depth", "10", "--width", "2", "--epochs", "2", "--batch", "128", "--kernel", "react"]
    script = [sys.executable, str(ROOT / "examples" / "polykervnet.py"), *options, "--checkpoint-every", "1"]
    script += ["--output", str(tmp_path)]
    # One thread: a sum may depend on how many there are.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(script, env=environment, stdout=subprocess.DEVNULL)
    while killed.poll() is None and not (tmp_path / training.CHECKPOINT).exists():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    finished = subprocess.run([*script, "--resume"], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    torch.set_num_threads(1)
    whole = trained(polykervnet.settings_of(polykervnet.parse(options)), digits, tmp_path / "whole")
    assert json.loads((tmp_path / training.HISTORY).read_text()) == [row.as_json() for row in whole.history]
    state = torch.load(tmp_path / training.CHECKPOINT, weights_only=True)["learners"]["student"]["model"]
    expected = whole.learners["student"].model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_script_neither_overwrites_a_run_nor_resumes_none(tmp_path, capsys):
    assert polykervnet.main(["--resume", "--output", str(tmp_path)]) == 2
    assert f"there is no checkpoint in {tmp_path}; leave out --resume" in capsys.readouterr().err
    (tmp_path / training.CHECKPOINT).touch()
    assert polykervnet.main(["--output", str(tmp_path)]) == 2
    assert f"there is a checkpoint in {tmp_path}; pass --resume" in capsys.readouterr().err


def test_quick_gives_way_to_what_is_asked_for():
    settings = polykervnet.settings_of(polykervnet.parse(["--quick", "--width", "7", "--clip", "0"]))
    assert (settings.depth, settings.width, settings.clip) == (10, 7, None)
    assert polykervnet.settings_of(polykervnet.parse([])) == Settings()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_ends_the_run(clip):
    model = nn.Linear(1, 1, bias=False)
    learner = training.Learner(model, replace(TINY, clip=clip), 10)
    before = model.weight.detach().clone()
    with pytest.raises(training.Divergence, match="the gradient's norm is nan at step 3") as found:
        # A loss of 0 whose slope is 0 times infinity.
        learner.step((model.weight * 0).sum().sqrt(), 2)
    assert found.value.step == 3
    assert torch.equal(model.weight, before)
    with pytest.raises(training.Divergence, match="the loss is inf at step 1"):
        learner.step(model.weight.abs().sum() / 0, 0)


def test_a_run_from_given_weights_and_without_batch_norm(digits, tmp_path):
    settings = replace(TINY, kernel="rpkn", batch_norm=False)
    _, twin = training.make_model(replace(settings, seed=5), digits)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in twin.modules())
    run = Run(settings, digits, tmp_path, CPU, twin.state_dict())
    state = run.learners["student"].model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in twin.state_dict().items())


def test_resnet_has_the_layers_of_its_depth():
    for layers in (10, 18, 34, 50):
        model = ResNet(layers, width=2)
        shortcuts = sum("downsample" in name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
        assert count_of_layers(model) - shortcuts == layers
    # The number of parameters of torchvision's resnet18 and resnet50, which its documentation gives.
    for layers, parameters in ((18, 11_689_512), (50, 25_557_032)):
        model = ResNet(layers, 1000, stem="imagenet")
        assert sum(value.numel() for value in model.parameters()) == parameters
    with pytest.raises(ValueError, match="depth: expected one of 10, 18, 34, 50, got 20"):
        ResNet(20)


def test_fifty_layers_without_batch_norm_overflow_with_pkn_and_not_with_rpkn(digits):
    x, y = digits.prepared(digits.train_x[:16], CPU), digits.train_y[:16]
    pkn, rpkn = (depth.measure(50, kernel, False, x, y, width=4, steps=1) for kernel in ("pkn", "rpkn"))
    assert pkn.verdict == "not finite"
    assert not math.isfinite(pkn.output)
    assert math.isfinite(rpkn.output)
    assert all(map(math.isfinite, rpkn.gradient_norms))


def test_fifty_layers_of_rpkn_with_batch_norm_are_trainable(digits):
    x, y = digits.prepared(digits.train_x[:32], CPU), digits.train_y[:32]
    found = depth.measure(50, "rpkn", True, x, y, width=4, steps=12)
    assert all(0 < norm < math.inf for norm in found.gradient_norms)
    assert found.verdict == "learns"


def test_depth_script_writes_table_and_picture(tmp_path, capsys):
    depth.main(
        [
            "--depths",
            "10",
            "--width",
            "2",
            "--image-size",
            "8",
            "--steps",
            "2",
            "--batch",
            "8",
            "--output",
            str(tmp_path),
        ]
    )
    rows = (tmp_path / "gradient-norms.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 * 12
    assert (tmp_path / "gradient-norms.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("R-PKN") == 2


def test_curves_show_where_the_test_loss_was_not_finite(tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = []
    plot = matplotlib.axes.Axes.plot

    def noted(axes, x, *rest, **style):
        drawn.append((list(x), style.get("label")))
        return plot(axes, x, *rest, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", noted)
    rows = [training.Epoch(number, 1.0, 0.5, loss, 0.5, 1.0) for number, loss in enumerate((2.0, float("nan"), 1.0), 1)]
    training.draw(tmp_path / "curves.png", rows, "")
    assert ([2], "test, not finite") in drawn

"""Callbacks for other libraries' training loops, with the libraries themselves where they are installed."""

from __future__ import annotations

import builtins
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chainzrule_kernels as ck

STRENGTH = 0.3
SCHEDULE = ck.schedules.linear(1.0, 0.0, 8)


def net() -> nn.Module:
    torch.manual_seed(1)
    return ck.nn.ChainzRuleNet((4, 6, 3), noise=0.3)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(2)
    return torch.randn(16, 4, generator=numbers), torch.randint(3, (16,), generator=numbers)


def trained_by_hand(steps: int, accumulate: int = 1) -> list[torch.Tensor]:
    """The parameters after so many steps with batches of two, written out."""
    model = net()
    reg = ck.DREG(model, STRENGTH, schedule=SCHEDULE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = list(zip(*(values.split(2) for values in samples()), strict=True))
    for step in range(steps):
        for x, target in batches[step * accumulate : (step + 1) * accumulate]:
            ((F.cross_entropy(model(x), target) + reg.penalty()) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        reg.step()
    return [parameter.detach() for parameter in model.parameters()]


def assert_same_parameters(model: nn.Module, expected: list[torch.Tensor]) -> None:
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)


@pytest.mark.parametrize(
    ("module", "packages"),
    [("lightning", ("lightning", "pytorch_lightning")), ("transformers", ("transformers",))],
)
def test_a_missing_package_is_named(module, packages, monkeypatch):
    genuine = builtins.__import__

    def imported(name, *rest):
        if name.split(".")[0] in packages:
            raise ImportError(f"No module named {name}")
        return genuine(name, *rest)

    monkeypatch.delitem(sys.modules, f"chainzrule_kernels.integrations.{module}", raising=False)
    monkeypatch.setattr(builtins, "__import__", imported)
    with pytest.raises(ImportError, match=rf"integrations.{module} needs the packages? {packages[0]}.*pip install"):
        importlib.import_module(f"chainzrule_kernels.integrations.{module}")


# ---- Lightning ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning.pytorch", reason="the package lightning is not installed")


@pytest.fixture
def lightning_module(lightning):
    class Module(lightning.LightningModule):
        """Returns its loss as a number or in a dictionary."""

        def __init__(self, in_dictionary=False):
            super().__init__()
            self.net = net()
            self.in_dictionary = in_dictionary

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            return {"loss": loss, "other": 1} if self.in_dictionary else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module


def lightning_trainer(lightning, tmp_path, callback, steps: int, **options):
    return lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": False, "enable_checkpointing": False, **options},
    )


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), batch_size=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("in_dictionary", [False, True])
def test_lightning_trains_as_by_hand(lightning, lightning_module, tmp_path, accumulate, in_dictionary):
    from chainzrule_kernels.integrations.lightning import DREGCallback

    module = lightning_module(in_dictionary)
    reg = ck.DREG(module.net, STRENGTH, schedule=SCHEDULE)
    monitor = ck.JacobianMonitor(reg, every=2)
    trainer = lightning_trainer(
        lightning, tmp_path, DREGCallback(reg, monitor), steps=4, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, loader())
    assert_same_parameters(module.net, trained_by_hand(4, accumulate))
    assert reg.state_dict() == {"position": 4}
    assert [row.step for row in monitor.history] == [2, 4]
    assert "training_step" not in module.__dict__
    assert trainer.logged_metrics["dreg/strength"].item() == pytest.approx(STRENGTH * SCHEDULE(3))
    assert trainer.logged_metrics["dreg/penalty"] > 0


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_from_a_checkpoint(lightning, lightning_module, tmp_path):
    from chainzrule_kernels.integrations.lightning import DREGCallback

    strengths = []

    def run(steps, **options):
        module = lightning_module()
        reg = ck.DREG(module.net, STRENGTH, schedule=SCHEDULE)
        module.net.register_forward_hook(lambda *arguments: strengths.append(reg.strength))
        callback = DREGCallback(reg, ck.JacobianMonitor(reg, every=1))
        trainer = lightning_trainer(lightning, tmp_path, callback, steps)
        trainer.fit(module, loader(), **options)
        return callback, trainer

    _, trainer = run(3)
    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    callback, _ = run(5, ckpt_path=tmp_path / "checkpoint.ckpt")
    assert strengths == [STRENGTH * SCHEDULE(step) for step in range(5)]
    assert callback.reg.state_dict() == {"position": 5}
    assert [row.step for row in callback.monitor.history] == [4, 5]


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_the_monitor(lightning, lightning_module, tmp_path):
    from lightning.pytorch.loggers.logger import Logger

    from chainzrule_kernels.integrations.lightning import DREGCallback

    class Recorder(Logger):
        name, version = "recorder", 0

        def __init__(self):
            super().__init__()
            self.metrics = {}

        def log_metrics(self, metrics, step=None):
            self.metrics.update({(key, step): value for key, value in metrics.items()})

        def log_hyperparams(self, *arguments, **options):
            """Nothing to log."""

    module, logger = lightning_module(), Recorder()
    reg = ck.DREG(module.net, STRENGTH)
    callback = DREGCallback(reg, ck.JacobianMonitor(reg, every=2))
    lightning_trainer(lightning, tmp_path, callback, 4, logger=logger).fit(module, loader())
    for row in callback.monitor.history:
        assert logger.metrics[f"jacobian/{row.layer}/mean", row.step] == row.mean
    assert len(callback.monitor.history) == 2


@pytest.mark.filterwarnings("ignore")
def test_lightning_gives_training_step_back_after_an_exception(lightning, lightning_module, tmp_path):
    from chainzrule_kernels.integrations.lightning import DREGCallback

    class Failing(lightning_module):
        def training_step(self, batch, index):
            raise ArithmeticError("on demand")

    module = Failing()
    callback = DREGCallback(ck.DREG(module.net))
    with pytest.raises(ArithmeticError, match="on demand"):
        lightning_trainer(lightning, tmp_path, callback, 2).fit(module, loader())
    assert "training_step" not in module.__dict__


@pytest.mark.filterwarnings("ignore")
def test_lightning_bad_input(lightning, lightning_module, tmp_path):
    from chainzrule_kernels.integrations.lightning import DREGCallback

    with pytest.raises(TypeError, match=r"reg: expected a chainzrule_kernels.DREG, got int"):
        DREGCallback(3)
    module = lightning_module()
    reg = ck.DREG(module.net)
    with pytest.raises(TypeError, match=r"monitor: expected a chainzrule_kernels.JacobianMonitor, got int"):
        DREGCallback(reg, 3)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="the LightningModule optimises by hand"):
        lightning_trainer(lightning, tmp_path, DREGCallback(reg), 1).fit(module, loader())


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    pytest.importorskip("accelerate", reason="the package accelerate is not installed")
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


class Classifier(nn.Module):
    """Returns its loss beside its output, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x=None, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ClassifierOfItems(Classifier):
    """Divides its loss by the number of items of an accumulated step, as language models do."""

    def forward(self, x=None, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.net(x)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss / (len(x) if num_items_in_batch is None else num_items_in_batch), "logits": logits}


class InOrder(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        x, target = samples()
        return {"x": x[index], "labels": target[index]}


def hugging_face_trainer(transformers, model, tmp_path, steps, accumulate=1, **options):
    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(InOrder())

    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return Trainer(model=model, args=arguments, train_dataset=InOrder())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("build", [Classifier, ClassifierOfItems])
def test_hugging_face_trains_as_by_hand(transformers, tmp_path, build, accumulate):
    from chainzrule_kernels.integrations.transformers import DREGCallback

    model = build()
    reg = ck.DREG(model.net, STRENGTH, schedule=SCHEDULE)
    monitor = ck.JacobianMonitor(reg, every=2)
    trainer = hugging_face_trainer(transformers, model, tmp_path, steps=4, accumulate=accumulate)
    DREGCallback(reg, monitor).attach(trainer)
    trainer.train()
    assert_same_parameters(model.net, trained_by_hand(4, accumulate))
    assert reg.state_dict() == {"position": 4}
    assert [row.step for row in monitor.history] == [2, 4]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["dreg_strength"] for entry in logs] == [pytest.approx(STRENGTH * SCHEDULE(step)) for step in range(4)]
    assert logs[1]["jacobian/0/mean"] == monitor.history[0].mean
    assert "jacobian/0/mean" not in logs[0]


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_goes_on_from_a_checkpoint(transformers, tmp_path):
    from chainzrule_kernels.integrations.transformers import DREGCallback

    def run(steps, **options):
        model = Classifier()
        reg = ck.DREG(model.net, STRENGTH, schedule=SCHEDULE)
        trainer = hugging_face_trainer(transformers, model, tmp_path, steps, save_strategy="steps", save_steps=3)
        DREGCallback(reg).attach(trainer)
        trainer.train(**options)
        return model, reg

    run(3)
    model, reg = run(5, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert reg.state_dict() == {"position": 5}
    assert_same_parameters(model.net, trained_by_hand(5))


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_evaluation_is_without_the_penalty(transformers, tmp_path):
    from chainzrule_kernels.integrations.transformers import DREGCallback

    model = Classifier()
    trainer = hugging_face_trainer(transformers, model, tmp_path, steps=1)
    DREGCallback(ck.DREG(model.net, STRENGTH)).attach(trainer)
    x, target = samples()
    loss = trainer.evaluate(InOrder())["eval_loss"]
    assert loss == pytest.approx(F.cross_entropy(model.net(x), target).item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_bad_input(transformers, tmp_path):
    from chainzrule_kernels.integrations.transformers import DREGCallback

    with pytest.raises(TypeError, match=r"reg: expected a chainzrule_kernels.DREG, got int"):
        DREGCallback(3)
    model = Classifier()
    reg = ck.DREG(model.net)
    with pytest.raises(TypeError, match=r"monitor: expected a chainzrule_kernels.JacobianMonitor, got int"):
        DREGCallback(reg, 3)
    with pytest.raises(TypeError, match=r"trainer: expected a transformers.Trainer, got int"):
        DREGCallback(reg).attach(3)
    trainer = hugging_face_trainer(transformers, model, tmp_path, steps=1)
    DREGCallback(reg).attach(trainer)
    with pytest.raises(ValueError, match="trainer: a DREGCallback is attached to it already"):
        DREGCallback(reg).attach(trainer)

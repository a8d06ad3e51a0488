"""A callback for the Trainer of Hugging Face that adds the penalty to the loss and steps the schedule.

Needs the packages transformers and accelerate.
"""

from __future__ import annotations

import functools
from typing import Any

from chainzrule_kernels.dreg import DREG
from chainzrule_kernels.monitor import JacobianMonitor

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "chainzrule_kernels.integrations.transformers needs the packages transformers and accelerate: "
        "pip install transformers accelerate"
    ) from error

__all__ = ["DREGCallback"]


class DREGCallback(TrainerCallback):
    """Regularises the model of a Trainer.

    .. code-block:: python

        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        DREGCallback(ck.DREG(model)).attach(trainer)
        trainer.train()

    In training the loss that the Trainer computes has the penalty added, averaged over the batches of an accumulated
    step. The schedule stands at the Trainer's global step, so it goes on rightly from a checkpoint. The Trainer's logs
    get ``dreg_penalty`` and ``dreg_strength``; of a monitor's measurements they get ``jacobian/<layer>/<quantity>``.

    Args:
        reg: attached to the Trainer's model, or to a part of it.
        monitor: its ``step`` is called with the optimizer, without inputs.

    Raises:
        TypeError: for arguments of the wrong type.
    """

    def __init__(self, reg: DREG, monitor: JacobianMonitor | None = None) -> None:
        if not isinstance(reg, DREG):
            raise TypeError(f"reg: expected a chainzrule_kernels.DREG, got {type(reg).__name__}")
        if monitor is not None and not isinstance(monitor, JacobianMonitor):
            raise TypeError(f"monitor: expected a chainzrule_kernels.JacobianMonitor, got {type(monitor).__name__}")
        self.reg = reg
        self.monitor = monitor
        self._latest: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> None:
        """Let ``trainer`` train with the penalty.

        Raises:
            TypeError: when it is no ``transformers.Trainer``.
            ValueError: when a DREGCallback is attached to it already.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}")
        if any(isinstance(callback, DREGCallback) for callback in trainer.callback_handler.callbacks):
            raise ValueError("trainer: a DREGCallback is attached to it already")
        # In the place of methods, since a callback can change neither the loss nor what is logged.
        trainer.__dict__["compute_loss"] = functools.partial(self._compute_loss, trainer)
        trainer.__dict__["log"] = functools.partial(self._log, trainer)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where the Trainer does."""
        self.reg.load_state_dict({"position": state.global_step})
        if self.monitor is not None:
            self.monitor.load_state_dict({"position": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step with the optimizer."""
        self.reg.step()
        for row in (None if self.monitor is None else self.monitor.step()) or ():
            for quantity in ("mean", "p99", "tail_ratio"):
                self._latest[f"jacobian/{row.layer}/{quantity}"] = getattr(row, quantity)

    def _compute_loss(self, trainer: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = type(trainer).compute_loss(trainer, model, inputs, return_outputs=True, **kwargs)
        if model.training:
            penalty = self.reg.penalty()
            self._latest["dreg_penalty"] = penalty.item()
            self._latest["dreg_strength"] = self.reg.strength
            if _is_divided_already(trainer, kwargs.get("num_items_in_batch")):
                penalty = penalty / trainer.current_gradient_accumulation_steps
            loss = loss + penalty.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _log(self, trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a log of the training, not of an evaluation
            logs = {**logs, **self._latest}
            self._latest.clear()
        type(trainer).log(trainer, logs, *args, **kwargs)


def _is_divided_already(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether the Trainer leaves the loss of an accumulated step as it is, because the model has divided it."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)
    if told is not None:
        return bool(told)
    by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return bool(by_model or trainer.compute_loss_func is not None)

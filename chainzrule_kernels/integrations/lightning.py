"""A Lightning callback that adds the penalty to the loss, steps the schedule and logs what the monitor measures.

Needs the package lightning, or pytorch-lightning where lightning is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chainzrule_kernels.dreg import DREG
from chainzrule_kernels.monitor import JacobianMonitor

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError(
            "chainzrule_kernels.integrations.lightning needs the package lightning: pip install lightning"
        ) from error

__all__ = ["DREGCallback"]


class _WithPenalty:
    """Stands in the place of a LightningModule's ``training_step``."""

    def __init__(self, pl_module: Any, reg: DREG) -> None:
        self.pl_module = pl_module
        self.reg = reg

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = type(self.pl_module).training_step(self.pl_module, *args, **kwargs)
        if result is None:  # the step is skipped
            return None
        penalty = self.reg.penalty()
        self.pl_module.log_dict({"dreg/penalty": penalty.detach(), "dreg/strength": self.reg.strength})
        if isinstance(result, Mapping):
            return {**result, "loss": result["loss"] + penalty}
        return result + penalty


class DREGCallback(Callback):
    """Regularises a LightningModule with automatic optimisation.

    .. code-block:: python

        module = MyModule()  # a LightningModule, whose network is module.net
        reg = ck.DREG(module.net)
        Trainer(callbacks=[DREGCallback(reg)]).fit(module, data)

    While it trains, ``training_step`` returns the loss with the penalty added. The schedule steps with the optimizer,
    and its position is stored in checkpoints. ``dreg/penalty`` and ``dreg/strength`` are logged; of a monitor's
    measurements ``jacobian/<layer>/<quantity>`` go to every logger.

    Args:
        reg: attached to the network inside the LightningModule, not to the LightningModule itself, whose own call is
            still running when ``training_step`` ends under some strategies.
        monitor: its ``step`` is called with the optimizer, without inputs.

    Raises:
        TypeError: for arguments of the wrong type.
    """

    def __init__(self, reg: DREG, monitor: JacobianMonitor | None = None) -> None:
        super().__init__()
        if not isinstance(reg, DREG):
            raise TypeError(f"reg: expected a chainzrule_kernels.DREG, got {type(reg).__name__}")
        if monitor is not None and not isinstance(monitor, JacobianMonitor):
            raise TypeError(f"monitor: expected a chainzrule_kernels.JacobianMonitor, got {type(monitor).__name__}")
        self.reg = reg
        self.monitor = monitor
        self._steps_taken = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Add the penalty to what ``training_step`` returns."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "DREGCallback: the LightningModule optimises by hand; add reg.penalty() to its loss and call reg.step()"
            )
        self._steps_taken = trainer.global_step
        pl_module.training_step = _WithPenalty(pl_module, self.reg)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Step with the optimizer, which takes several batches when gradients are accumulated."""
        if trainer.global_step == self._steps_taken:
            return
        self._steps_taken = trainer.global_step
        self.reg.step()
        rows = None if self.monitor is None else self.monitor.step()
        for row in rows or ():
            values = {"mean": row.mean, "p99": row.p99, "tail_ratio": row.tail_ratio}
            metrics = {f"jacobian/{row.layer}/{quantity}": value for quantity, value in values.items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give ``training_step`` back."""
        self._leave(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give ``training_step`` back."""
        self._leave(pl_module)

    def _leave(self, pl_module: Any) -> None:
        if isinstance(pl_module.__dict__.get("training_step"), _WithPenalty):
            del pl_module.training_step

    def state_dict(self) -> dict[str, Any]:
        """The positions of the schedule and of the monitor."""
        monitor = {} if self.monitor is None else {"monitor": self.monitor.state_dict()}
        return {"regulariser": self.reg.state_dict(), **monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.reg.load_state_dict(state_dict["regulariser"])
        if self.monitor is not None and "monitor" in state_dict:
            self.monitor.load_state_dict(state_dict["monitor"])

r"""Where a layer writes its Jacobian norms while a DREG is attached to it.

A layer's forward returns ``y`` alone, so that it fits anywhere; the norm that its op computes beside ``y`` goes to
the layer's :class:`JacobianRecord`. The regulariser opens a :class:`ForwardPass` when the model's forward begins,
which empties the records, and closes it when it ends.

Everything here is written so that Dynamo can trace it: one list for each layer, emptied by assignment, so that the
trace reads no state of an earlier pass and has nothing to guard on.
"""

from __future__ import annotations

import sys
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.ops._linear import squared_row_norms
from chainzrule_kernels.ops.polynomial_dreg.op import polynomial_dreg

if TYPE_CHECKING:
    from chainzrule_kernels.dreg import DREG


class ForwardPass:
    """Where the regularised model is in its forward, and what its layers shall record.

    Attributes:
        depth: how many calls of the model are running: 0 outside its forward, 2 where its forward calls the model.
        has_begun: whether the model has run since the regulariser was attached.
        is_complete: whether the latest pass reached its end. One that an exception ended did not.
        measures_nonlinearity: whether the layers measure it beside their norms.
        regulariser: the one that this belongs to; a copy of a layer alone has none.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.has_begun = False
        self.is_complete = False
        self.measures_nonlinearity = False
        self.regulariser: weakref.ref[DREG] | None = None
        self._caller: FrameType | None = None

    def begin(self) -> bool:
        """A call of the model begins. Whether it is a pass of its own, rather than a call inside one."""
        if not torch.compiler.is_compiling():
            if self._caller is not None and not _is_running(self._caller):
                self.depth = 0
            if self.depth == 0:
                # Two frames up: the one that runs the hook, and then the forward.
                self._caller = sys._getframe(2)
        self.depth += 1
        if self.depth > 1:
            return False
        self.has_begun = True
        self.is_complete = False
        return True

    def complete(self) -> None:
        """A call of the model has reached its end."""
        if self.depth == 1:
            self.is_complete = True

    def end(self) -> None:
        """A call of the model ends, by an exception or not."""
        if self.depth > 0:
            self.depth -= 1
        if self.depth == 0:
            self._caller = None

    def forget_interrupted(self) -> None:
        """Close a pass whose end was never told: PyTorch's hooks do not see a KeyboardInterrupt."""
        if self._caller is None or not _is_running(self._caller):
            self.depth = 0
            self._caller = None

    def clear(self) -> None:
        """As if the model had not run."""
        self.has_begun = self.is_complete = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy has had no pass; its regulariser, where it is copied too, makes itself known.
        return ForwardPass().__dict__


def _is_running(frame: FrameType) -> bool:
    current: FrameType | None = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


def is_under_vmap() -> bool:
    """Whether the code runs inside torch.vmap, at any level of nesting with other transforms.

    What a value is there means nothing once the transform has ended, and it need not be a batched tensor itself: it
    may be one that torch.func.grad has wrapped.
    """
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def refuse_replica(module: nn.Module) -> None:
    """Raise for a replica of torch.nn.DataParallel: it shares hooks and records with the module it was made of."""
    if not torch.compiler.is_compiling() and getattr(module, "_is_replica", False):
        raise RuntimeError(
            f"DREG: this {type(module).__name__} is a replica made by torch.nn.DataParallel, whose replicas would all "
            "record in one place. Use torch.nn.parallel.DistributedDataParallel, or remove the regulariser"
        )


class JacobianRecord:
    r"""The Jacobian norms of one layer in the latest forward pass of the model.

    Attributes:
        calls: ``(jac_sq, number of units)`` for each time the layer ran. A layer that the model uses twice has two
            entries.
        nonlinearity: ``E‖J - E J‖_F² / E‖J‖_F²`` over the samples of the latest call; only when it is being measured.
    """

    def __init__(self, forward_pass: ForwardPass, linear: nn.Module | None) -> None:
        """Record for a layer; ``linear`` has the ``weight`` whose row norms count, None for the activation alone."""
        self.forward_pass = forward_pass
        self.linear = linear
        self.calls: list[tuple[Tensor, int]] = []
        self.nonlinearity: float | None = None

    def polynomial(self, z: Tensor, coeffs: Tensor) -> Tensor:
        """``p(z)``, with the Jacobian norm recorded."""
        row_sq = None if self.linear is None else squared_row_norms(self.linear.weight, z)  # type: ignore[arg-type]
        if not self.forward_pass.measures_nonlinearity:
            y, jac_sq = polynomial_dreg(z, coeffs, row_sq)
        else:
            y, jac_sq, slope = polynomial_dreg(z, coeffs, row_sq, return_derivative=True)
            self.nonlinearity = _relative_variance(slope.to(compute_dtype(z)), row_sq)
        self.add(jac_sq, z.shape[-1])
        return y

    def add(self, jac_sq: Tensor, units: int) -> None:
        """Record one run of the layer, unless the run is not the model's forward pass itself."""
        if not torch.compiler.is_compiling():
            # Activation checkpointing runs the layer again inside the backward pass: it has been counted.
            if torch._C._current_graph_task_id() != -1:
                self._check_recomputation(jac_sq)
                return
            if is_under_vmap():
                return
        if self.forward_pass.depth > 0:
            self.calls.append((jac_sq, units))

    def _check_recomputation(self, jac_sq: Tensor) -> None:
        if jac_sq.requires_grad and self.calls and not any(recorded.requires_grad for recorded, _ in self.calls):
            raise RuntimeError(
                "DREG: a regularised layer ran without gradients in the forward pass and with them in the backward "
                "pass, so the gradient of its penalty would be lost. Use torch.utils.checkpoint.checkpoint(..., "
                "use_reentrant=False)"
            )

    def __getstate__(self) -> dict[str, Any]:
        # The recorded tensors belong to a graph, which can be neither copied nor stored.
        return {**self.__dict__, "calls": [], "nonlinearity": None}


def _relative_variance(slope: Tensor, row_sq: Tensor | None) -> float:
    """``E‖J - E J‖_F² / E‖J‖_F²`` for ``J = diag(slope) W``: 0 for a layer that acts linearly on these samples."""
    slope = slope.flatten(0, -2) if slope.dim() > 1 else slope.unsqueeze(0)
    spread, size = slope.var(0, correction=0), slope.square().mean(0)
    if row_sq is not None:
        spread, size = spread * row_sq, size * row_sq
    return (spread.sum() / size.sum()).item()

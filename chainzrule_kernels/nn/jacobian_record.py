r"""Where a layer writes its Jacobian norms while a DREG is attached to it.

A layer's forward returns ``y`` alone, so that it fits anywhere; the norm that its op computes beside ``y`` goes to
the layer's :class:`JacobianRecord`. The regulariser opens a :class:`ForwardPass` when the model's forward begins,
which empties the records, and closes it when it ends.

Everything here is written so that Dynamo can trace it: one list for each layer, emptied by assignment, so that the
trace reads no state of an earlier pass and has nothing to guard on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.ops._linear import squared_row_norms
from chainzrule_kernels.ops.polynomial_dreg.op import polynomial_dreg


class ForwardPass:
    """Whether the regularised model is in its forward, and what its layers shall record."""

    def __init__(self) -> None:
        self.is_open = False
        self.measures_nonlinearity = False


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
            # A value inside torch.vmap means nothing once the transform has ended.
            if torch._C._functorch.is_batchedtensor(jac_sq):
                return
        if self.forward_pass.is_open:
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

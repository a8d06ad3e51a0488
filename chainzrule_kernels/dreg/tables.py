"""How the numbers of a regulariser become one, and the rows of what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LayerReport", "Reduction", "RegularisedLayer"]

Summary = Literal["mean", "sum"]


@dataclass(frozen=True)
class Reduction:
    """How ``f'(z_j)² r_j`` of every sample, unit and layer become one number: ``"mean"`` or ``"sum"`` over each.

    Attributes:
        batch: over the samples, that is over every dimension of a layer's input but the last.
        units: over the units ``j`` of a layer.
        layers: over the layers; a layer that the model runs twice in a forward pass counts twice.
    """

    batch: Summary = "mean"
    units: Summary = "sum"
    layers: Summary = "sum"

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name, value in vars(self).items():
            if value not in ("mean", "sum"):
                raise ValueError(f"{name}: expected 'mean' or 'sum', got {value!r}")


@dataclass(frozen=True)
class RegularisedLayer:
    """One row of :attr:`DREG.layers`.

    Attributes:
        name: of the activation's module, as in ``model.named_modules()``; for a function, and for a module that serves
            several linear maps, which of them it stands behind.
        module: the activation's class or function.
        units: the number of its units, or of channels for a convolution; None when it takes any.
        penalises: ``"layer"`` for ``Σ_j f'(z_j)² ‖W_j‖²``, ``"activation"`` for ``Σ_j f'(z_j)²``.
        weight: the factor on its term.
        note: where ``W`` stands, or why it is not taken into account.
    """

    name: str
    module: str
    units: int | None
    penalises: str
    weight: float
    note: str


@dataclass(frozen=True)
class LayerReport:
    """One row of :meth:`DREG.report`: the per-sample Jacobian norm ``‖J‖_F`` (not squared) of a layer.

    Attributes:
        name: of the layer.
        mean: over the samples.
        p99: the 99th percentile.
        tail_ratio: ``p99 / mean``.
        nonlinearity: ``E‖J - E J‖_F² / E‖J‖_F²``, between 0 (the layer acts linearly on these samples) and 1; None
            when the report was made without inputs.
    """

    name: str
    mean: float
    p99: float
    tail_ratio: float
    nonlinearity: float | None

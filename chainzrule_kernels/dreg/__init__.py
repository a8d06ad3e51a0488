"""DREG: the size of the layer Jacobians as a penalty, for any model (arXiv 2606.23942).

For a layer ``y = f(W x + b)`` the Jacobian is ``J = diag(f'(z)) W``, and per sample ``‖J‖_F² = Σ_j f'(z_j)² ‖W_j‖²``
exactly. The fused pass that computes ``y`` computes it beside; this package finds the layers, collects what they
recorded, and sums it. Its parts:

* ``discovery``: which linear maps have an activation behind them (``discover(model)``), from traces, without running;
  ``recognition`` knows modules and functions, ``selection`` which of the layers are taken;
* ``attachment`` and ``interception``: what is put on the modules meanwhile;
  :mod:`chainzrule_kernels.nn.jacobian_record` is what a layer writes into;
* ``regulariser``: :class:`DREG`, which ties them together; ``tables`` has the rows that it shows.
"""

from chainzrule_kernels.dreg.discovery import Between, Discovery, Layer, SkippedActivation, discover
from chainzrule_kernels.dreg.regulariser import DREG
from chainzrule_kernels.dreg.tables import LayerReport, Reduction, RegularisedLayer

__all__ = [
    "DREG",
    "Between",
    "Discovery",
    "Layer",
    "LayerReport",
    "Reduction",
    "RegularisedLayer",
    "SkippedActivation",
    "discover",
]

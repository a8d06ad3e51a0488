r"""DREG: the size of the layer Jacobians as a penalty (arXiv 2606.23942).

For a layer ``y = f(W x + b)`` the Jacobian is ``J = diag(f'(z)) W``, and per sample ``‖J‖_F² = Σ_j f'(z_j)² ‖W_j‖²``
exactly. The layer's own fused pass computes it beside ``y``; this module finds the layers, collects what they
recorded, and sums it.

The parts are separate so that each can grow: :func:`find_layers` says which modules are regularised and how,
:class:`~chainzrule_kernels.nn.jacobian_record.JacobianRecord` is what a layer writes into, :class:`Reduction` is how
the numbers of many samples, units and layers become one, and :class:`DREG` ties them together.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chainzrule_kernels.diagnostics import Table, percentile, tail_ratio
from chainzrule_kernels.functions.sums import sum_of_all
from chainzrule_kernels.nn import Polynomial, PolynomialLinear
from chainzrule_kernels.nn.jacobian_record import ForwardPass, JacobianRecord, is_under_vmap, refuse_replica

__all__ = ["DREG", "LayerReport", "Reduction", "RegularisedLayer"]

SUPPORTED = (
    "this version regularises chainzrule_kernels.nn.PolynomialLinear, and chainzrule_kernels.nn.Polynomial, behind a "
    'torch.nn.Linear in a torch.nn.Sequential or alone, with variant "layer" or "activation"'
)
VARIANTS = ("layer", "activation")

_PLAIN_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish)
# They stand between a linear map and its activation without changing the layer's Jacobian norm.
_TRANSPARENT = (nn.Dropout, nn.Identity)

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
        name: of the module, as in ``model.named_modules()``.
        module: its class.
        units: the number of its units; None when it takes any.
        penalises: ``"layer"`` for ``Σ_j f'(z_j)² ‖W_j‖²``, ``"activation"`` for ``Σ_j f'(z_j)²``.
        note: where ``W`` stands, or why it is not taken into account.
    """

    name: str
    module: str
    units: int | None
    penalises: str
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


class DREG:
    r"""A penalty on the size of the layer Jacobians of a model (arXiv 2606.23942).

    .. code-block:: python

        reg = ck.DREG(model, strength=10**-2.5)
        for x, target in data:
            loss = F.cross_entropy(model(x), target) + reg.penalty()
            loss.backward()
            optimizer.step(); optimizer.zero_grad(); reg.step()

    While it is attached, the regularised layers compute their Jacobian norms in the pass that computes their
    activation, in training and evaluation mode alike, and their outputs stay what they are. The penalty is

    ``strength · schedule(step) · Σ_layers mean_batch Σ_j f'(z_j)² r_j``, with ``r_j = ‖W_j‖²`` or 1.

    Args:
        model: this version regularises :class:`~chainzrule_kernels.nn.PolynomialLinear`, and
            :class:`~chainzrule_kernels.nn.Polynomial` behind a :class:`torch.nn.Linear` in a
            :class:`torch.nn.Sequential` (with nothing but dropout or identities between them) or alone. A last linear
            layer without an activation is not counted.
        strength: λ; ``10**-2.5`` is that of arXiv 2606.23942.
        variant: ``"layer"`` for ``r_j = ‖W_j‖²``, differentiated too, or ``"activation"`` for ``r_j = 1``. A
            ``Polynomial`` without a ``Linear`` in front is penalised with ``r_j = 1`` in either; :attr:`layers` says
            which.
        reduction: mean or sum over batch, units and layers; by default mean, sum and sum.
        probes: belongs to the variant ``"accumulated"``; leave it at 1.
        schedule: a factor on the strength for each step, such as ``ck.schedules.linear(1.0, 0.0, 1000)``; None for 1.

    Raises:
        TypeError, ValueError: for arguments out of range; for a model in which nothing can be regularised, or which is
            regularised already.

    Under ``torch.compile``, compile the model or a function that contains both ``model(x)`` and ``reg.penalty()``;
    neither a new batch size nor a step of the schedule recompiles. With activation checkpointing use
    ``use_reentrant=False``, since a reentrant checkpoint is refused in the backward pass; checkpoints inside a compiled
    model need ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``.
    ``copy.deepcopy((model, reg))`` copies both; a copy of the model alone carries a regulariser of its own, which
    ``DREG.detach(copy)`` takes off. Under ``torch.vmap`` nothing is recorded, and the latest pass stays what it was. A
    replica of :class:`torch.nn.DataParallel` is refused. The norms of the latest pass are kept until the next one;
    their graph's buffers are freed by the backward pass as usual.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float = 10**-2.5,
        variant: str = "layer",
        reduction: Reduction | None = None,
        probes: int | str = 1,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        _check_arguments(model, strength, variant, reduction, probes, schedule)
        # A compiled model wraps the one whose forward runs.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.variant = variant
        self.reduction = Reduction() if reduction is None else reduction
        self.schedule = schedule
        self._base_strength = float(strength)
        self._position = 0
        self._forward_pass = ForwardPass()
        self._forward_pass.regulariser = weakref.ref(self)
        self._records: list[JacobianRecord] = []

        found = find_layers(self.model, variant)
        _check_found(self.model, found)
        self.layers: Table[RegularisedLayer] = Table(site.row for site in found)
        for site in found:
            record = JacobianRecord(self._forward_pass, site.linear)
            site.module.jacobian_record = record
            self._records.append(record)
        self._modules = [site.module for site in found]
        self._handles = [
            self.model.register_forward_pre_hook(self._open_pass),
            self.model.register_forward_hook(self._complete_pass),
            self.model.register_forward_hook(self._close_pass, always_call=True),
        ]
        self._strength = self._strength_tensor()

    # ---- the forward pass -------------------------------------------------------------------------------------------

    def _open_pass(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        refuse_replica(model)
        if _is_a_pass() and self._forward_pass.begin():
            for record in self._records:
                record.calls = []

    def _complete_pass(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if _is_a_pass():
            self._forward_pass.complete()

    def _close_pass(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # An exception in the forward, or in a hook before ours, leads here past _complete_pass.
        if _is_a_pass() and not getattr(model, "_is_replica", False):
            self._forward_pass.end()

    def _check_pass(self) -> None:
        """Raise when the latest pass has not reached its end."""
        if self._forward_pass.has_begun and not self._forward_pass.is_complete:
            if not torch.compiler.is_compiling():
                self._forward_pass.forget_interrupted()
            raise RuntimeError(_INCOMPLETE)

    def _nothing_recorded(self) -> RuntimeError:
        return RuntimeError(_NO_LAYER_RAN if self._forward_pass.has_begun else _NOTHING_RECORDED)

    # ---- the penalty ------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """The penalty of the latest forward pass, strength included: a 0-d tensor to add to the loss.

        In float32, float64 for float64 data. Calling it again gives the same value. Layers that did not run in that
        pass contribute nothing.

        Raises:
            RuntimeError: when the model, or every regularised layer of it, has not run since the regulariser was
                attached; when the latest pass has not reached its end, because of an exception or because it is still
                running; under ``torch.vmap``, where nothing is recorded.
        """
        if not torch.compiler.is_compiling() and is_under_vmap():
            raise RuntimeError(_UNDER_VMAP)
        self._check_pass()
        terms: list[Tensor] = []
        for record in self._records:
            for jac_sq, units in record.calls:
                # In a fixed order, so that the penalty does not depend on the number of threads.
                term = sum_of_all(jac_sq)
                if self.reduction.batch == "mean":
                    term = term / jac_sq.numel()
                terms.append(term / units if self.reduction.units == "mean" else term)
        if not terms:
            raise self._nothing_recorded()
        total = terms[0]
        for term in terms[1:]:
            total = total + term.to(total.device)
        if self.reduction.layers == "mean":
            total = total / len(terms)
        return total * self._strength.to(total)

    # ---- the schedule -----------------------------------------------------------------------------------------------

    @property
    def strength(self) -> float:
        """The strength at this step: that of the constructor times the schedule's factor."""
        return self._base_strength * (1.0 if self.schedule is None else float(self.schedule(self._position)))

    def step(self) -> None:
        """Advance the schedule by one step; call it after the optimizer's."""
        self._position += 1
        self._strength = self._strength_tensor()

    def state_dict(self) -> dict[str, int]:
        """The position in the schedule."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position that :meth:`state_dict` returned.

        Raises:
            TypeError, ValueError: when ``state`` is not what :meth:`state_dict` returns.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state: expected what DREG.state_dict() returns, got {type(state).__name__}")
        position = state.get("position")
        if set(state) != {"position"} or not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ValueError(f"state: expected the keys and values of DREG.state_dict(), got {state!r}")
        self._position = position
        self._strength = self._strength_tensor()

    def _strength_tensor(self) -> Tensor:
        # A tensor, where a number would be a constant of the compiled graph and recompile it at each step; a new one
        # each time, since the graph of an earlier penalty may hold the old one. In float64, since the model may become
        # that later.
        coeffs = self._modules[0].coeffs
        # Nothing can be copied from the meta device once the model has left it.
        return torch.full((), self.strength, dtype=torch.float64, device="cpu" if coeffs.is_meta else coeffs.device)

    # ---- looking at it ----------------------------------------------------------------------------------------------

    def jac_sq(self) -> dict[str, list[Tensor]]:
        """By the layer's name, ``‖J‖_F²`` for each sample in the latest forward pass, once for each time the layer ran.

        The tensors are part of the graph, as the penalty is. A layer that did not run has an empty list.

        Raises:
            RuntimeError: when the latest pass has not reached its end.
        """
        self._check_pass()
        return {
            layer.name: [jac_sq for jac_sq, _ in record.calls]
            for layer, record in zip(self.layers, self._records, strict=True)
        }

    def report(self, *inputs: Any) -> Table[LayerReport]:
        """Per layer, the mean, 99th percentile and tail ratio of the per-sample Jacobian norm ``‖J‖_F``.

        Args:
            *inputs: none, for the norms of the latest forward pass; or the model's arguments, for a pass of their own
                in evaluation mode and without gradients, which also measures the nonlinearity and leaves the latest
                pass as it was.

        Returns:
            One :class:`LayerReport` for each layer that ran; print the table to read it.

        Raises:
            RuntimeError: when the model, or every regularised layer of it, has not run since the regulariser was
                attached, or when the latest pass has not reached its end.
        """
        if not inputs:
            return self._report()
        recorded = [record.calls for record in self._records]
        latest = self._forward_pass.has_begun, self._forward_pass.is_complete
        training = [module for module in self.model.modules() if module.training]
        self._forward_pass.measures_nonlinearity = True
        try:
            for module in training:
                module.training = False
            with torch.no_grad():
                self.model(*inputs)
            return self._report()
        finally:
            self._forward_pass.measures_nonlinearity = False
            self._forward_pass.has_begun, self._forward_pass.is_complete = latest
            for module in training:
                module.training = True
            for record, calls in zip(self._records, recorded, strict=True):
                record.calls = calls
                record.nonlinearity = None

    def _report(self) -> Table[LayerReport]:
        self._check_pass()
        rows = []
        for layer, record in zip(self.layers, self._records, strict=True):
            if record.calls:
                norms = torch.cat([jac_sq.detach().flatten() for jac_sq, _ in record.calls]).sqrt()
                mean = norms.mean(dtype=torch.float64).item()
                rows.append(
                    LayerReport(layer.name, mean, percentile(norms, 99.0), tail_ratio(norms), record.nonlinearity)
                )
        if not rows:
            raise self._nothing_recorded()
        return Table(rows)

    def __repr__(self) -> str:
        return f"DREG(strength={self.strength:.4g}, variant={self.variant!r}, layers={len(self.layers)})"

    # ---- leaving ----------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Detach from the model, which is then as if it had never been regularised. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        for module, record in zip(self._modules, self._records, strict=True):
            if module.__dict__.get("jacobian_record") is record:
                del module.jacobian_record
            record.calls = []
        self._forward_pass.clear()

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Remove every regulariser that is attached to ``model`` or to a part of it, without having it at hand.

        That is how to regularise a copy anew: a copy of a regularised model, or of one of its layers, carries a
        regulariser of its own, to which only the copy refers. One that is attached to a larger model, of which
        ``model`` is a part, is removed from all of it. Where there is none, nothing happens.

        Raises:
            TypeError: when ``model`` is not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        for module in model.modules():
            hooks = module._forward_pre_hooks.values()
            owners = [getattr(hook, "__self__", None) for hook in hooks]
            record = module.__dict__.get("jacobian_record")
            if record is not None:
                regulariser = record.forward_pass.regulariser
                owners.append(None if regulariser is None else regulariser())
            for owner in owners:
                if isinstance(owner, DREG):
                    owner.remove()
            # The copy of a layer has a record, and no regulariser where that one was not copied with it.
            module.__dict__.pop("jacobian_record", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forward_pass.regulariser = weakref.ref(self)


def _is_a_pass() -> bool:
    """Whether a call of the model is a forward pass to record.

    Inside the backward pass it is a checkpoint that recomputes the whole model, and under vmap there is nothing to
    keep.
    """
    return torch.compiler.is_compiling() or (torch._C._current_graph_task_id() == -1 and not is_under_vmap())


_NOTHING_RECORDED = (
    "DREG: no forward pass of the model has been recorded. Call the model itself, as model(x), before penalty() or "
    "report(); a call of model.forward or of a part of the model is not recorded"
)
_NO_LAYER_RAN = "DREG: no regularised layer ran in the latest forward pass of the model, or they ran under torch.vmap"
_INCOMPLETE = (
    "DREG: the latest forward pass of the model did not reach its end, because of an exception or because it is still "
    "running, so the norms of its layers are not all there. Call the model again before penalty(), report() or jac_sq()"
)
_UNDER_VMAP = "DREG: penalty() was called under torch.vmap, where nothing is recorded. Call it outside"


@dataclass(frozen=True)
class _Site:
    """A place to regularise: its row in the table, the module that has a record, the module whose ``weight`` counts."""

    row: RegularisedLayer
    module: Polynomial | PolynomialLinear
    linear: nn.Module | None


def find_layers(model: nn.Module, variant: str) -> list[_Site]:
    """The places in ``model`` that the variant regularises."""
    found = []
    in_front = _linear_in_front(model)
    for name, module in model.named_modules():
        linear: nn.Linear | PolynomialLinear | None
        units: int | None
        if isinstance(module, PolynomialLinear):
            linear, units, note = module, module.out_features, "its own weight"
        elif isinstance(module, Polynomial):
            linear, note = in_front.get(module, (None, "in no torch.nn.Sequential, so without a known linear layer"))
            units = module.num_channels if linear is None else linear.out_features
        else:
            continue
        if variant == "activation":
            linear, note = None, "as the variant says"
        penalises = "activation" if linear is None else "layer"
        found.append(_Site(RegularisedLayer(name, type(module).__name__, units, penalises, note), module, linear))
    return found


def _linear_in_front(model: nn.Module) -> dict[nn.Module, tuple[nn.Linear | None, str]]:
    """For each ``Polynomial`` in a ``Sequential``: the ``Linear`` in front of it, and a note on what is there."""
    result: dict[nn.Module, tuple[nn.Linear | None, str]] = {}
    for container_name, container in model.named_modules():
        if not isinstance(container, nn.Sequential):
            continue
        before: tuple[str, nn.Module] | None = None
        for child_name, child in container._modules.items():
            if isinstance(child, Polynomial):
                linear, note = _as_linear(before, container_name)
                if child in result and result[child][0] is not linear:
                    linear, note = None, "it stands behind several layers"
                result[child] = (linear, note)
            if child is not None and not isinstance(child, _TRANSPARENT):
                before = (child_name, child)
    return result


def _as_linear(before: tuple[str, nn.Module] | None, container_name: str) -> tuple[nn.Linear | None, str]:
    if before is None:
        return None, "nothing in front of it in its torch.nn.Sequential"
    name = f"{container_name}.{before[0]}" if container_name else before[0]
    if isinstance(before[1], nn.Linear):
        # A subclass may compute something else than x Wᵀ + b from its weight, and so may a forward put on the module.
        if type(before[1]).forward is nn.Linear.forward and "forward" not in before[1].__dict__:
            return before[1], f"the weight of {name}"
        return None, f"{name} in front of it, a {type(before[1]).__name__}, has a forward of its own"
    return None, f"{name} in front of it, a {type(before[1]).__name__}, is not a torch.nn.Linear"


def _check_arguments(model: Any, strength: Any, variant: Any, reduction: Any, probes: Any, schedule: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(strength, int | float) or isinstance(strength, bool):
        raise TypeError(f"strength: expected a number, got {type(strength).__name__}")
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength: expected a finite number of at least 0, got {strength}")
    if variant not in VARIANTS:
        reason = "the accumulated Jacobian is not offered yet; " if variant == "accumulated" else ""
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}: {reason}{SUPPORTED}")
    if reduction is not None and not isinstance(reduction, Reduction):
        raise TypeError(f"reduction: expected a chainzrule_kernels.Reduction, got {type(reduction).__name__}")
    if probes != 1:
        raise ValueError(f"probes: expected 1, since the variant {variant!r} is exact without probes, got {probes!r}")
    if schedule is not None and not callable(schedule):
        raise TypeError(f"schedule: expected a function of the step, got {type(schedule).__name__}")


def _check_found(model: nn.Module, found: list[_Site]) -> None:
    if not found:
        raise ValueError(f"model: found no layer to regularise in a {type(model).__name__}; {SUPPORTED}")
    for site in found:
        if site.module.jacobian_record is not None:
            raise ValueError(
                f"model: its layer {site.row.name!r} has a DREG attached already, which a copy of a model brings with "
                "it; call remove() on that one first, or chainzrule_kernels.DREG.detach(model)"
            )
    others = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _PLAIN_ACTIVATIONS)
    ]
    if others:
        warnings.warn(f"DREG does not regularise {', '.join(others)}: {SUPPORTED}", stacklevel=3)

r"""DREG: the size of the layer Jacobians as a penalty (arXiv 2606.23942)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chainzrule_kernels._tracing import is_exporting
from chainzrule_kernels.diagnostics import Table, percentile, tail_ratio
from chainzrule_kernels.dreg.accumulated import Probes, TangentPass, find_start
from chainzrule_kernels.dreg.attachment import Attachment, attached_interception
from chainzrule_kernels.dreg.discovery import Discovery, Layer, SkippedActivation, discover
from chainzrule_kernels.dreg.selection import Choice, Weights, choose_layers, weights_of
from chainzrule_kernels.dreg.tables import LayerReport, Reduction, RegularisedLayer
from chainzrule_kernels.functions.sums import sum_of_all
from chainzrule_kernels.nn.jacobian_record import ForwardPass, is_under_vmap, refuse_replica

__all__ = ["DREG"]

VARIANTS = ("layer", "activation", "accumulated")


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
        model: any module. A layer is a linear layer or a convolution with an activation behind it, whether module,
            function or function kept in an attribute; dropout and batch norm may stand between. :attr:`layers` shows
            what was found, :attr:`skipped` what was not and why. A last linear layer without an activation is not
            counted, and neither is an activation behind a sum or another activation.
        strength: λ; ``10**-2.5`` is that of arXiv 2606.23942.
        variant: ``"layer"`` for ``r_j = ‖W_j‖²``, differentiated too, or ``"activation"`` for ``r_j = 1``. For a
            convolution ``r`` is the sum of ``W²`` over the taps that fall inside the image; a batch norm between scales
            it by ``(gamma / sigma)²``, sigma detached. Behind another norm, and for a ``Polynomial`` without a linear
            map in front, ``r_j = 1`` in either; :attr:`layers` says which. ``"accumulated"`` penalises ``‖G_l‖_F²``,
            with ``G_l = ∂y_l/∂x`` from the model's input to the layer's output, by tangents: see below.
        reduction: mean or sum over batch, units and layers; by default mean, sum and sum.
        probes: for the variant ``"accumulated"``: how many Gaussian tangents estimate each norm, without bias, or
            ``"exact"`` for one tangent for each number of a sample's input. Otherwise leave it at 1.
        schedule: a factor on the strength for each step, such as ``ck.schedules.linear(1.0, 0.0, 1000)``, at least 0;
            None for 1.
        layers: names of those to regularise, in which ``*`` and ``?`` are wildcards, or a predicate on
            :class:`~chainzrule_kernels.dreg.discovery.Layer`; None for all. A layer answers to its own name, its linear
            map's and its activation's. By name, activations with no linear map in front can be asked for, too.
        weights: a factor on each layer's term, as a mapping from such names or a function of the layer; None for 1.
        start: for ``"accumulated"``, the name of the module whose output is ``x``. None for the first floating-point
            tensor among the model's arguments, and for the output of its first embedding if there is none.

    Raises:
        TypeError, ValueError: for arguments out of range; for a model in which nothing can be regularised, or which is
            regularised already.

    ``"accumulated"`` runs the model a second time when the penalty is asked for, with tangents by
    :func:`torch.func.jvp`: a forward pass and, for each probe, about as much again; the backward pass grows likewise.
    The samples of a batch must not mix, as they do in a batch norm in training mode, which makes the norms those of
    their sum. Operations without a forward mode raise; attention is computed by PyTorch's plain formula there. Hooks on
    parts of the model run a second time, too. It is refused under ``torch.compile`` and with activation checkpointing.

    Under ``torch.compile``, compile the model or a function that contains both ``model(x)`` and ``reg.penalty()``;
    neither a new batch size nor a step of the schedule recompiles. With activation checkpointing use
    ``use_reentrant=False``, since a reentrant checkpoint is refused in the backward pass; checkpoints inside a compiled
    model need ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``.
    A pass belongs to the thread that runs it: what another thread asks for meanwhile is refused.
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
        probes: Probes = 1,
        schedule: Callable[[int], float] | None = None,
        *,
        layers: Choice = None,
        weights: Weights = None,
        start: str | None = None,
    ) -> None:
        _check_arguments(model, strength, variant, reduction, probes, schedule, start)
        # A compiled model wraps the one whose forward runs.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.variant = variant
        self.probes = probes
        self.reduction = Reduction() if reduction is None else reduction
        self.schedule = schedule
        self._base_strength = float(strength)
        self._position = 0
        self._forward_pass = ForwardPass()
        self._forward_pass.regulariser = weakref.ref(self)
        _refuse_attached(self.model)
        discovery = discover(self.model)
        _check_found(self.model, discovery)
        found = choose_layers(discovery, layers)
        if not found:
            raise ValueError(
                f"layers: no activation in the {type(self.model).__name__} has a linear layer or convolution in front; "
                "name those that shall be regularised for themselves, or '*' for all of them"
                f"{_listing(discovery.skipped)}"
            )
        self._weights = weights_of(found, weights)
        # What the user's functions raise, they raise before anything stands on the model.
        self._strength = self._strength_tensor()
        self.layers: Table[RegularisedLayer] = Table(
            _row(layer, variant, weight) for layer, weight in zip(found, self._weights, strict=True)
        )
        self.skipped: Table[SkippedActivation] = Table(_not_regularised(discovery, found))
        self._forward_pass.is_silent = variant == "accumulated"
        self._attachment = Attachment(
            self.model,
            found,
            [layer for layer in discovery.layers if layer not in found],
            self._forward_pass,
            with_norms=variant == "layer",
            start=find_start(self.model, start) if variant == "accumulated" else None,
        )
        self._start_is_chosen = start is not None
        self._tangent_pass: TangentPass | None = None
        self._records = self._attachment.records
        self._handles = [
            self.model.register_forward_pre_hook(self._open_pass),
            self.model.register_forward_hook(self._complete_pass),
            self.model.register_forward_hook(self._close_pass, always_call=True),
        ]
        if variant == "accumulated":
            self._handles.append(self.model.register_forward_pre_hook(self._keep_arguments, with_kwargs=True))

    # ---- the forward pass -------------------------------------------------------------------------------------------

    def _open_pass(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        refuse_replica(model)
        if self._is_a_pass() and self._forward_pass.begin():
            for record in self._records:
                record.calls = []
            self._tangent_pass = None

    def _keep_arguments(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(_NOT_COMPILED)
        if self._is_a_pass() and self._forward_pass.depth == 1:
            self._tangent_pass = TangentPass(self.model, args, kwargs, self._attachment.start, self._start_is_chosen)

    def _run_tangents(self) -> None:
        """Fill the records by tangents behind the latest pass, if that has not been done."""
        tangent_pass, self._tangent_pass = self._tangent_pass, None
        if tangent_pass is not None:
            for record, norms, units in tangent_pass.run(self._forward_pass, self.probes):
                record.calls.append((norms, units))

    def _is_a_pass(self) -> bool:
        """Whether a call of the model is a forward pass to record: not while tangents run."""
        return _is_a_pass() and self._forward_pass.outputs is None

    def _complete_pass(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._is_a_pass():
            self._forward_pass.complete()

    def _close_pass(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # An exception in the forward, or in a hook before ours, leads here past _complete_pass.
        if self._is_a_pass() and not getattr(model, "_is_replica", False):
            self._forward_pass.end()

    def _recorded(self) -> list[list[tuple[Tensor, int]]]:
        """For each layer, what the latest pass has recorded.

        Raises:
            RuntimeError: when that pass has not reached its end, or is not that of this thread.
        """
        if not torch.compiler.is_compiling():
            self._forward_pass.refuse_other_threads()
        if self._forward_pass.has_begun and not self._forward_pass.is_complete:
            if not torch.compiler.is_compiling():
                self._forward_pass.forget_interrupted()
            raise RuntimeError(_INCOMPLETE)
        self._run_tangents()
        recorded = [record.calls for record in self._records]
        if not torch.compiler.is_compiling():
            # Behind the look at the records, which another thread may empty at any time.
            self._forward_pass.check_latest()
        self._attachment.prepare_backward(recorded)
        return recorded

    def _nothing_recorded(self) -> RuntimeError:
        return RuntimeError(_NO_LAYER_RAN if self._forward_pass.has_begun else _NOTHING_RECORDED)

    # ---- the penalty ------------------------------------------------------------------------------------------------

    def penalty(self, mask: Tensor | None = None) -> Tensor:
        """The penalty of the latest forward pass, strength included: a 0-d tensor to add to the loss.

        In float32, float64 for float64 data. Calling it again gives the same value. Layers that did not run in that
        pass contribute nothing, and neither does an empty batch.

        Args:
            mask: bool, True for each position that counts, of the shape of every layer's input without the last
                dimension: ``(B, T)`` for a token model, whose padding then counts neither in the sum nor in the mean.
                None counts every position.

        Raises:
            TypeError, ValueError: when ``mask`` is not a bool tensor, or of another shape than a layer's norms.
            RuntimeError: when the model, or every regularised layer of it, has not run since the regulariser was
                attached; when the latest pass has not reached its end, because of an exception or because it is still
                running; when another thread is in a pass, or has run the model since this one did; under
                ``torch.vmap``, where nothing is recorded.
        """
        if not torch.compiler.is_compiling() and is_under_vmap():
            raise RuntimeError(_UNDER_VMAP)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a bool tensor, got {got}")
        groups: list[_Norms] = []
        count = 0
        for layer, weight, calls in zip(self.layers, self._weights, self._recorded(), strict=True):
            for jac_sq, units in calls:
                _check_mask(mask, layer.name, jac_sq)
                factor = weight / max(units, 1) if self.reduction.units == "mean" else weight
                _norms_like(groups, jac_sq, factor).values.append(jac_sq)
                count += 1
        if not groups:
            raise self._nothing_recorded()
        total = self._over_batch(groups[0], mask)
        for group in groups[1:]:
            total = total + self._over_batch(group, mask).to(total.device)
        if self.reduction.layers == "mean":
            total = total / count
        return total * self._strength.to(total)

    def _over_batch(self, norms: _Norms, mask: Tensor | None) -> Tensor:
        """The sum or mean over the samples. In a fixed order, so that it does not depend on the number of threads."""
        values = norms.values[0] if len(norms.values) == 1 else torch.stack(norms.values)
        positions: Tensor | int = max(norms.values[0].numel(), 1)
        if mask is not None:
            mask = mask.to(values.device)
            # Where, and not a product: what padding computes may be infinite.
            values = torch.where(mask, values, 0.0)
            positions = mask.sum().clamp(min=1)
        total = sum_of_all(values)
        if self.reduction.batch == "mean":
            total = total / positions
        return total if norms.factor == 1.0 else total * norms.factor

    # ---- the schedule -----------------------------------------------------------------------------------------------

    @property
    def strength(self) -> float:
        """The strength at this step: that of the constructor times the schedule's factor.

        Raises:
            TypeError, ValueError: when the schedule gives something else than a finite number of at least 0.
        """
        if self.schedule is None:
            return self._base_strength
        factor = self.schedule(self._position)
        try:
            number = float(factor)
        except (TypeError, ValueError) as error:
            got = f"{type(factor).__name__} at step {self._position}"
            raise TypeError(f"schedule: expected a function that gives a number, got {got}") from error
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"schedule: expected a finite number of at least 0 at step {self._position}, got {number}")
        return self._base_strength * number

    def step(self) -> None:
        """Advance the schedule by one step; call it after the optimizer's.

        Raises:
            TypeError, ValueError: as :attr:`strength`.
        """
        self._position += 1
        self._strength = self._strength_tensor()

    def state_dict(self) -> dict[str, int]:
        """The position in the schedule."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position that :meth:`state_dict` returned.

        Raises:
            TypeError, ValueError: when ``state`` is not what :meth:`state_dict` returns; and as :attr:`strength`.
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
        parameter = next(self.model.parameters(), None)
        # Nothing can be copied from the meta device once the model has left it.
        device = "cpu" if parameter is None or parameter.is_meta else parameter.device
        return torch.full((), self.strength, dtype=torch.float64, device=device)

    # ---- looking at it ----------------------------------------------------------------------------------------------

    def jac_sq(self) -> dict[str, list[Tensor]]:
        """By the layer's name, ``‖J‖_F²`` for each sample in the latest forward pass, once for each time the layer ran.

        The tensors are part of the graph, as the penalty is. A layer that did not run has an empty list.

        Raises:
            RuntimeError: when the latest pass has not reached its end, or is not that of this thread.
        """
        return {
            layer.name: [jac_sq for jac_sq, _ in calls]
            for layer, calls in zip(self.layers, self._recorded(), strict=True)
        }

    def report(self, *inputs: Any, **keywords: Any) -> Table[LayerReport]:
        """Per layer, the mean, 99th percentile and tail ratio of the per-sample Jacobian norm ``‖J‖_F``.

        Args:
            *inputs: none, for the norms of the latest forward pass; or the model's arguments, for a pass of their own
                in evaluation mode and without gradients, which also measures the nonlinearity and leaves the latest
                pass as it was.
            **keywords: the model's keyword arguments, likewise.

        Returns:
            One :class:`LayerReport` for each layer that ran; print the table to read it. NaN for an empty batch.

        Raises:
            RuntimeError: when the model, or every regularised layer of it, has not run since the regulariser was
                attached, when the latest pass has not reached its end, or when it is not that of this thread.
        """
        if not inputs and not keywords:
            return self._report()
        recorded = [record.calls for record in self._records]
        tangent_pass = self._tangent_pass
        self._forward_pass.refuse_other_threads()
        latest = self._forward_pass.remember()
        training = [module for module in self.model.modules() if module.training]
        self._forward_pass.measures_nonlinearity = True
        try:
            for module in training:
                module.training = False
            with torch.no_grad():
                self.model(*inputs, **keywords)
            return self._report()
        finally:
            self._forward_pass.measures_nonlinearity = False
            self._forward_pass.restore(latest)
            for module in training:
                module.training = True
            for record, calls in zip(self._records, recorded, strict=True):
                record.calls = calls
                record.nonlinearity = None
            self._tangent_pass = tangent_pass

    def _report(self) -> Table[LayerReport]:
        rows = []
        for layer, record, calls in zip(self.layers, self._records, self._recorded(), strict=True):
            if calls:
                norms = torch.cat([jac_sq.detach().flatten() for jac_sq, _ in calls]).sqrt()
                mean = norms.mean(dtype=torch.float64).item()
                # Of an empty batch, whose mean is NaN too.
                is_empty = norms.numel() == 0
                p99, ratio = (math.nan, math.nan) if is_empty else (percentile(norms, 99.0), tail_ratio(norms))
                rows.append(LayerReport(layer.name, mean, p99, ratio, record.nonlinearity))
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
        self._attachment.remove()
        self._tangent_pass = None
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
            record, interception = module.__dict__.get("jacobian_record"), attached_interception(module)
            for attached in (record, interception):
                regulariser = None if attached is None else attached.forward_pass.regulariser
                owners.append(None if regulariser is None else regulariser())
            for owner in owners:
                if isinstance(owner, DREG):
                    owner.remove()
            # The copy of a layer has a record, and no regulariser where that one was not copied with it.
            module.__dict__.pop("jacobian_record", None)
            while (interception := attached_interception(module)) is not None:
                interception.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tangent_pass": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forward_pass.regulariser = weakref.ref(self)


def _is_a_pass() -> bool:
    """Whether a call of the model is a forward pass to record.

    Inside the backward pass it is a checkpoint that recomputes the whole model, under vmap there is nothing to keep,
    and an export only traces.
    """
    if is_exporting():
        return False
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
_NOT_COMPILED = (
    "DREG: the variant 'accumulated' runs tangents through the model behind its forward pass, which torch.compile "
    "cannot trace. Leave the regularised model uncompiled, or take variant='layer'"
)
_UNDER_VMAP = "DREG: penalty() was called under torch.vmap, where nothing is recorded. Call it outside"


class _Norms(NamedTuple):
    """Norms that one sum adds up, of as many samples each: a call of PyTorch takes longer than a small layer's sum.

    Attributes:
        values: of each run of a layer, alike in shape, dtype and device.
        factor: on their sum.
    """

    values: list[Tensor]
    factor: float


def _norms_like(groups: list[_Norms], jac_sq: Tensor, factor: float) -> _Norms:
    """The group to which ``jac_sq`` belongs, perhaps a new one."""
    for group in groups:
        first = group.values[0]
        is_alike = (first.dtype, first.device) == (jac_sq.dtype, jac_sq.device)
        if group.factor == factor and is_alike and _have_one_shape(first, jac_sq):
            return group
    groups.append(_Norms([], factor))
    return groups[-1]


def _have_one_shape(one: Tensor, other: Tensor) -> bool:
    if not torch.compiler.is_compiling():
        return one.shape == other.shape
    # How many samples an expert of a mixture gets is not known to a compiled graph.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return one.dim() == other.dim() and all(
        guard_or_false(mine == its) for mine, its in zip(one.shape, other.shape, strict=True)
    )


def _check_mask(mask: Tensor | None, name: str, jac_sq: Tensor) -> None:
    if mask is not None and mask.shape != jac_sq.shape:
        raise ValueError(
            f"mask: expected the shape {tuple(jac_sq.shape)} of layer {name!r}'s norms, got {tuple(mask.shape)}; leave "
            "layers of other samples than the mask's out with layers="
        )


def _check_arguments(
    model: Any, strength: Any, variant: Any, reduction: Any, probes: Any, schedule: Any, start: Any
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(strength, int | float) or isinstance(strength, bool):
        raise TypeError(f"strength: expected a number, got {type(strength).__name__}")
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength: expected a finite number of at least 0, got {strength}")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if reduction is not None and not isinstance(reduction, Reduction):
        raise TypeError(f"reduction: expected a chainzrule_kernels.Reduction, got {type(reduction).__name__}")
    _check_probes(probes, variant)
    if start is not None and variant != "accumulated":
        raise ValueError(f"start: belongs to the variant 'accumulated', got {start!r} with {variant!r}")
    if schedule is not None and not callable(schedule):
        raise TypeError(f"schedule: expected a function of the step, got {type(schedule).__name__}")


def _check_probes(probes: Any, variant: str) -> None:
    if variant != "accumulated":
        if probes != 1:
            raise ValueError(
                f"probes: expected 1, since the variant {variant!r} is exact without probes, got {probes!r}"
            )
    elif isinstance(probes, str):
        if probes != "exact":
            raise ValueError(f"probes: expected a number of probes or 'exact', got {probes!r}")
    elif not isinstance(probes, int) or isinstance(probes, bool):
        raise TypeError(f"probes: expected a number of probes or 'exact', got {type(probes).__name__}")
    elif probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}")


def _row(layer: Layer, variant: str, weight: float) -> RegularisedLayer:
    module = layer.function if layer.activation is None else type(layer.activation).__name__
    if variant == "activation":
        return RegularisedLayer(layer.name, module, layer.units, "activation", weight, "as the variant says")
    if variant == "accumulated":
        return RegularisedLayer(layer.name, module, layer.units, variant, weight, "by tangents through the model")
    penalises = "layer" if layer.folds else "activation"
    return RegularisedLayer(layer.name, module, layer.units, penalises, weight, layer.note)


def _not_regularised(discovery: Discovery, found: list[Layer]) -> list[SkippedActivation]:
    names = {layer.name for layer in found}
    left_out = [
        SkippedActivation(layer.name, layer.function, "left out by layers=")
        for layer in discovery.layers
        if layer.name not in names
    ]
    return [*left_out, *(row for row in discovery.skipped if row.name not in names)]


def _check_found(model: nn.Module, discovery: Discovery) -> None:
    if not discovery.layers and not discovery.possible:
        raise ValueError(
            f"model: found no layer to regularise in a {type(model).__name__}, that is no linear layer or convolution "
            f"with an activation behind it{_listing(discovery.skipped)}"
        )


def _listing(skipped: Iterable[SkippedActivation]) -> str:
    rows = list(skipped)
    lines = "".join(f"\n  {row.name} ({row.module}): {row.reason}" for row in rows[:_MOST_LISTED])
    if len(rows) > _MOST_LISTED:
        lines += f"\n  and {len(rows) - _MOST_LISTED} more, which chainzrule_kernels.dreg.discover(model).skipped lists"
    return f". Not regularised are:{lines}" if lines else ""


# Of a large model, the first rows tell what the others do.
_MOST_LISTED = 12


def _refuse_attached(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.__dict__.get("jacobian_record") is not None or attached_interception(module) is not None:
            raise ValueError(
                f"model: its layer {name!r} has a DREG attached already, which a copy of a model brings with it; call "
                "remove() on that one first, or chainzrule_kernels.DREG.detach(model)"
            )

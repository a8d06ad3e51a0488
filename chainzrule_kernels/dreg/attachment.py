"""Putting records and interceptions on the modules of a model, and taking them off."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from chainzrule_kernels import _distributed
from chainzrule_kernels.dreg.accumulated import Start
from chainzrule_kernels.dreg.discovery import Between, Layer
from chainzrule_kernels.dreg.interception import (
    Handing,
    Interception,
    MarkingLinear,
    RecordingActivation,
    WatchingFunctions,
)
from chainzrule_kernels.nn.jacobian_record import ActivationRecords, ForwardPass, JacobianRecord


class Attachment:
    """What a regulariser has put on the modules of a model.

    Args:
        model: the regularised model.
        layers: the layers to record.
        left_out: those that were found and are not recorded.
        forward_pass: the regulariser's.
        with_norms: whether row norms count; otherwise every layer is recorded for its activation alone.
        start: the module from whose output tangents may run; None without tangents.

    Attributes:
        records: one for each layer, in the order of ``layers``.
        start: what stands in the place of that module's forward.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[Layer],
        left_out: Iterable[Layer],
        forward_pass: ForwardPass,
        with_norms: bool,
        start: nn.Module | None,
    ) -> None:
        self.records: list[JacobianRecord] = []
        # For each record, the modules that contain the layer, from the outermost.
        self._containing: list[tuple[nn.Module, ...]] = []
        self._forward_pass = forward_pass
        self._with_norms = with_norms
        self._interceptions: list[Interception] = []
        self._has_record: list[nn.Module] = []
        # The records of each activation, and of each function of each module whose forward calls functions.
        self._of_activation: dict[nn.Module, ActivationRecords] = {}
        self._of_functions: dict[nn.Module, dict[str, ActivationRecords]] = {}
        marked: dict[nn.Module, tuple[str, bool]] = {}
        between: dict[nn.Module, Between] = {}
        for layer in layers:
            self.records.append(self._record(layer))
            self._containing.append(_containing(model, layer))
            if layer.linear is None or layer.linear_name is None or layer.has_own_weight:
                continue
            _, folds = marked.get(layer.linear, ("", False))
            marked[layer.linear] = (layer.linear_name, folds or layer.folds)
            between.update({item.module: item for item in layer.between})
        for layer in left_out:
            # What an activation is given without a linear map in front is told from what it is given by this one.
            found = self._records_found(layer)
            if found is not None and None in found.by_linear and layer.linear is not None:
                found.by_linear.setdefault(layer.linear_name, None)
                marked.setdefault(layer.linear, (layer.linear_name or "", False))
                between.update({item.module: item for item in layer.between})
        for module, (name, folds) in marked.items():
            self._interceptions.append(MarkingLinear(module, forward_pass, name, folds and with_norms))
        for module, item in between.items():
            if item.is_function or item.role == "batch norm":
                self._of_functions.setdefault(module, {})
            else:
                self._interceptions.append(Handing(module, forward_pass, keeps_norms=not item.is_norm))
        self.start = None if start is None else Start(start, forward_pass)
        if self.start is not None:
            self._interceptions.append(self.start)
        for module in model.modules():
            # In evaluation they run as one kernel, past the modules inside, unless functions are watched.
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
                self._of_functions.setdefault(module, {})
        for module, records in self._of_functions.items():
            self._interceptions.append(WatchingFunctions(module, forward_pass, records))

    def _record(self, layer: Layer) -> JacobianRecord:
        if layer.has_own_weight:
            record = JacobianRecord(self._forward_pass, layer.linear if self._with_norms else None)
            self._put(layer.owner, record)
            return record
        record = JacobianRecord(self._forward_pass, None, spread=layer.linear, may_leave_input=layer.overwrites_unseen)
        records = self._records_of(layer)
        records.by_linear[layer.linear_name] = record
        if layer.linear is None:
            records.spatial = layer.spatial
        return record

    def _records_found(self, layer: Layer) -> ActivationRecords | None:
        """The records of the layer's activation, where other layers have made them."""
        if layer.activation is None:
            return self._of_functions.get(layer.owner, {}).get(layer.function)
        return self._of_activation.get(layer.activation)

    def _records_of(self, layer: Layer) -> ActivationRecords:
        """The records of the layer's activation, with the module made to use them when they are new."""
        if layer.activation is None:
            of_owner = self._of_functions.setdefault(layer.owner, {})
            return of_owner.setdefault(layer.function, ActivationRecords(self._forward_pass))
        records = self._of_activation.get(layer.activation)
        if records is None:
            records = self._of_activation[layer.activation] = ActivationRecords(self._forward_pass)
            if layer.kind is None:
                self._put(layer.activation, records)
            else:
                self._interceptions.append(
                    RecordingActivation(layer.activation, self._forward_pass, layer.kind, records, layer.in_place)
                )
        return records

    def _put(self, module: nn.Module, record: JacobianRecord | ActivationRecords) -> None:
        module.jacobian_record = record  # type: ignore[assignment]
        self._has_record.append(module)

    def prepare_backward(self, recorded: Iterable[list[tuple[Tensor, int]]]) -> None:
        """See that the weights of FSDP2 are there when a backward pass comes to the norms of each layer."""
        if _distributed.may_shard():
            for calls, containing in zip(recorded, self._containing, strict=True):
                sharded = [module for module in containing if _distributed.is_sharded(module)]
                if sharded:  # torch.compile cannot go on behind this
                    for jac_sq, _ in calls:
                        _distributed.bring_weights_back(jac_sq, sharded)

    def remove(self) -> None:
        """Take everything off. Calling it again does nothing."""
        for interception in reversed(self._interceptions):
            interception.remove()
        for module in self._has_record:
            record = module.__dict__.get("jacobian_record")
            if record is not None and record.forward_pass is self._forward_pass:
                del module.jacobian_record
        for record in self.records:
            record.calls = []


def _containing(model: nn.Module, layer: Layer) -> tuple[nn.Module, ...]:
    found = [model]
    for name in (layer.owner_name, layer.linear_name or ""):
        module = model
        for child in filter(None, name.split(".")):
            module = module.get_submodule(child)
            found.append(module)
    return tuple(dict.fromkeys(found))


def attached_interception(module: nn.Module) -> Interception | None:
    """What stands in the place of the module's forward, if anything does."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, Interception) else None

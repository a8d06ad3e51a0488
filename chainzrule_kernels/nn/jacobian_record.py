r"""Where a layer writes its Jacobian norms while a DREG is attached to it.

A layer's forward returns ``y`` alone, so that it fits anywhere; the norm that its op computes beside ``y`` goes to
the layer's :class:`JacobianRecord`. The regulariser opens a :class:`ForwardPass` when the model's forward begins,
which empties the records, and closes it when it ends.

An activation may serve several linear maps, and the forward that calls them is the user's. So a linear map's output
carries a :class:`Source`, which says whose output it is and what its squared row norms are, and an activation asks its
:class:`ActivationRecords` for the record that belongs to the source of what it was given.

Everything here is written so that Dynamo can trace it: one list for each layer, emptied by assignment, so that the
trace reads no state of an earlier pass and has nothing to guard on.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from chainzrule_kernels import _distributed
from chainzrule_kernels._remembered import remembered
from chainzrule_kernels._tracing import is_exporting
from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.functions.activations import Activation
from chainzrule_kernels.functions.base import ScalarFunction
from chainzrule_kernels.functions.polynomial import polynomial_of
from chainzrule_kernels.ops.activation_dreg.op import activation_dreg
from chainzrule_kernels.ops.activation_spatial_dreg.op import activation_spatial_dreg
from chainzrule_kernels.ops.convolved_activation_dreg.op import ConvolutionInFront
from chainzrule_kernels.ops.polynomial.op import polynomial
from chainzrule_kernels.ops.polynomial_dreg.op import polynomial_dreg
from chainzrule_kernels.ops.polynomial_spatial_dreg.op import polynomial_spatial_dreg
from chainzrule_kernels.ops.squared_weights.op import squared_row_norms

if TYPE_CHECKING:
    from chainzrule_kernels.dreg.regulariser import DREG

Result = TypeVar("Result")
RowSq = Tensor | ConvolutionInFront | None
"""Squared row norms, the convolution whose weight they come from, or None for 1."""


class _OwnPasses(threading.local):
    """The latest pass that this thread has run, for each model, as :attr:`ForwardPass.latest` names it."""

    def __init__(self) -> None:
        self.latest: weakref.WeakKeyDictionary[ForwardPass, object] = weakref.WeakKeyDictionary()


_own_passes = _OwnPasses()
# So that of two threads that begin at once one is refused.
_beginning = threading.Lock()


class ForwardPass:
    """Where the regularised model is in its forward, and what its layers shall record.

    A pass belongs to the thread that runs it. Compiled code is not told which one that is.

    Attributes:
        depth: how many calls of the model are running: 0 outside its forward, 2 where its forward calls the model.
        has_begun: whether the model has run since the regulariser was attached.
        is_complete: whether the latest pass reached its end. One that an exception ended did not.
        measures_nonlinearity: whether the layers measure it beside their norms.
        is_silent: whether the layers record nothing in the model's own pass, since tangents will run behind it.
        shares_work: whether other processes share the work, which may take a layer's weight away behind its forward.
        outputs: while tangents run, what the layers have given out so far; otherwise None.
        regulariser: the one that this belongs to; a copy of a layer alone has none.
        latest: what the latest pass is known by; None before the first and for one of compiled code.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.has_begun = False
        self.is_complete = False
        self.measures_nonlinearity = False
        self.is_silent = False
        self.shares_work = False
        self.outputs: list[Output] | None = None
        self.regulariser: weakref.ref[DREG] | None = None
        self.latest: object = None
        self._caller: FrameType | None = None
        self._thread = 0

    @property
    def is_listening(self) -> bool:
        """Whether the layers have anything to record."""
        return not self.is_silent or self.outputs is not None

    def begin(self) -> bool:
        """A call of the model begins. Whether it is a pass of its own, rather than a call inside one.

        Raises:
            RuntimeError: when another thread is in a pass.
        """
        if torch.compiler.is_compiling():
            self.latest = None
            # What the compiler leaves out of its graphs, such as the hooks of FSDP2, runs as ever.
            self.shares_work = _distributed.may_shard()
        else:
            with _beginning:
                self.refuse_other_threads()
                if self._caller is not None:
                    self.forget_interrupted()
                if self.depth == 0:
                    # Two frames up: the one that runs the hook, and then the forward.
                    self._caller, self._thread = sys._getframe(2), threading.get_ident()
                    self.latest = _own_passes.latest[self] = object()
                    self.shares_work = _distributed.may_shard()
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
        # One that was refused does not end the pass of the other thread.
        if not torch.compiler.is_compiling() and self._is_of_another_thread:
            return
        if self.depth > 0:
            self.depth -= 1
        if self.depth == 0:
            self._caller = None

    def forget_interrupted(self) -> None:
        """Close a pass whose end was never told: PyTorch's hooks do not see a KeyboardInterrupt."""
        if self._caller is None or not _is_running(self._caller, self._thread):
            self.depth = 0
            self._caller = None

    @property
    def _is_of_another_thread(self) -> bool:
        return self._caller is not None and self._thread != threading.get_ident()

    def refuse_other_threads(self) -> None:
        """Raise when another thread is in a pass."""
        if self._is_of_another_thread and self._caller is not None and _is_running(self._caller, self._thread):
            raise RuntimeError(_TWO_THREADS)

    def check_latest(self) -> None:
        """Raise when another thread has run a pass since this one did, if it did."""
        own = _own_passes.latest.get(self)
        if own is not None and self.latest is not None and own is not self.latest:
            raise RuntimeError(_ANOTHER_THREAD_SINCE)

    def remember(self) -> tuple[bool, bool, object, object]:
        """What :meth:`restore` needs to forget the passes that this thread runs from now on."""
        return self.has_begun, self.is_complete, self.latest, _own_passes.latest.get(self)

    def restore(self, remembered: tuple[bool, bool, object, object]) -> None:
        """Go back to the pass that was the latest."""
        self.has_begun, self.is_complete, self.latest, own = remembered
        if own is None:
            _own_passes.latest.pop(self, None)
        else:
            _own_passes.latest[self] = own

    def clear(self) -> None:
        """As if the model had not run."""
        self.has_begun = self.is_complete = False
        self.latest = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has had no pass; its regulariser, where it is copied too, makes itself known.
        return {**ForwardPass().__dict__, "is_silent": self.is_silent}


_TWO_THREADS = (
    "DREG: another thread is in a forward pass of this model, and a regularised model records one pass at a time. Give "
    "each thread a copy, copy.deepcopy((model, regulariser)), or call remove() on the regulariser before serving"
)
_ANOTHER_THREAD_SINCE = (
    "DREG: another thread has run the model since this one did, and the norms are those of the latest pass. Give each "
    "thread a copy, copy.deepcopy((model, regulariser)), or keep the others out until the norms have been asked for"
)


def _is_running(frame: FrameType, thread: int) -> bool:
    current: FrameType | None = sys._current_frames().get(thread)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


def is_under_vmap() -> bool:
    """Whether the code runs inside torch.vmap, at any level of nesting with other transforms.

    What a value is there means nothing once the transform has ended, and it need not be a batched tensor itself: it
    may be one that torch.func.grad has wrapped.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def refuse_replica(module: nn.Module) -> None:
    """Raise for a replica of torch.nn.DataParallel: it shares hooks and records with the module it was made of."""
    if not torch.compiler.is_compiling() and getattr(module, "_is_replica", False):
        raise RuntimeError(
            f"DREG: this {type(module).__name__} is a replica made by torch.nn.DataParallel, whose replicas would all "
            "record in one place. Use torch.nn.parallel.DistributedDataParallel, or remove the regulariser"
        )


class Source(NamedTuple):
    """Whose output a tensor is. The tensor carries it, so that it lives as long as the tensor does.

    Attributes:
        linear: the name of the linear map.
        row_sq: its squared row norms ``(N,)``, or for feature maps ``(C,)`` or ``(C, *spatial)``, or what they come
            from; None for 1.
        spatial: the number of spatial dimensions of a feature map ``(B, C, *spatial)`` or ``(C, *spatial)``; None for
            ``(..., N)``.
        version: of the tensor. A later one means that something has written into it since.
    """

    linear: str
    row_sq: RowSq
    spatial: int | None
    version: int


def summed(row_sq: RowSq) -> Tensor | None:
    """The squared row norms themselves, where a convolution stands for them."""
    return row_sq.tap_sq() if isinstance(row_sq, ConvolutionInFront) else row_sq


def source_of(value: Any) -> Source | None:
    """The source that a tensor carries, unless the tensor has been overwritten since."""
    source = getattr(value, "_jacobian_source", None)
    return source if source is not None and source.version == _version_of(value) else None


def set_source(value: Tensor, linear: str, row_sq: RowSq, spatial: int | None) -> None:
    """Let a tensor carry its source."""
    value._jacobian_source = Source(linear, row_sq, spatial, _version_of(value))  # type: ignore[attr-defined]


def forget_source(value: Tensor) -> None:
    """Let a tensor carry no source any more."""
    value._jacobian_source = None  # type: ignore[attr-defined]


def with_versions(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """``function(*args, **kwargs)``; in inference mode as normal tensors, which count versions, without gradients."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return function(*args, **kwargs)
    with torch.inference_mode(False), torch.no_grad():
        return function(*args, **kwargs)


def _version_of(value: Tensor) -> int:
    # A trace need not count: Dynamo would make a constant of it. What the model was given may be an inference tensor.
    if torch.compiler.is_compiling() or value.is_inference():
        return 0
    return value._version


class Output(NamedTuple):
    """What a layer gave out while tangents ran.

    Attributes:
        record: of the layer.
        value: its output.
        spatial: as :attr:`Source.spatial`.
    """

    record: JacobianRecord
    value: Tensor
    spatial: int | None

    @property
    def units(self) -> int:
        """How many numbers the output has for each sample."""
        return math.prod(self.value.shape[self._first_dimension :])

    def squared_norm(self, tangent: Tensor) -> Tensor:
        """``Σ_j ẏ_j²`` for each sample."""
        return tangent.to(compute_dtype(tangent)).square().flatten(self._first_dimension).sum(-1)

    @property
    def _first_dimension(self) -> int:
        return -1 if self.spatial is None else -1 - self.spatial


class FixedActivation:
    """An activation of one of the :data:`~chainzrule_kernels.ACTIVATION_KINDS`, as records call it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.scalar = Activation(kind)

    def value(self, z: Tensor) -> Tensor:
        """``y`` alone, by functions of PyTorch."""
        (y,) = self.scalar.derivatives(z.to(compute_dtype(z)), 0)
        return y.to(z.dtype)

    def with_norm(self, z: Tensor, row_sq: Tensor | None) -> tuple[Tensor, Tensor]:
        """``y`` and ``jac_sq`` over the last dimension."""
        return activation_dreg(z, self.kind, row_sq)

    def with_norm_of_images(self, z: Tensor, tap_sq: RowSq) -> tuple[Tensor, Tensor]:
        """``y`` and ``jac_sq (B,)`` for ``z (B, C, *spatial)``."""
        if isinstance(tap_sq, ConvolutionInFront):
            return tap_sq.activation_dreg(z, self.kind)
        return activation_spatial_dreg(z, self.kind, tap_sq)


@remembered
def fixed_activation(kind: str) -> FixedActivation:
    """The activation of that kind: one object for all that ask, which nobody changes."""
    return FixedActivation(kind)


class LearnablePolynomial:
    """A polynomial with the given coefficients, of ``relu(z)`` where ``rectified``, as records call it."""

    def __init__(self, coeffs: Tensor, rectified: bool = False) -> None:
        self.coeffs = coeffs
        self.rectified = rectified

    @property
    def scalar(self) -> ScalarFunction:
        """The function of one number."""
        return polynomial_of(self.coeffs, self.rectified)

    def value(self, z: Tensor) -> Tensor:
        """``y`` alone."""
        return polynomial(z, self.coeffs, rectified=self.rectified)

    def with_norm(self, z: Tensor, row_sq: Tensor | None) -> tuple[Tensor, Tensor]:
        """``y`` and ``jac_sq`` over the last dimension."""
        return polynomial_dreg(z, self.coeffs, row_sq, rectified=self.rectified)

    def with_norm_of_images(self, z: Tensor, tap_sq: RowSq) -> tuple[Tensor, Tensor]:
        """``y`` and ``jac_sq (B,)`` for ``z (B, C, *spatial)``."""
        return polynomial_spatial_dreg(z, self.coeffs, summed(tap_sq), rectified=self.rectified)


class JacobianRecord:
    r"""The Jacobian norms of one layer in the latest forward pass of the model.

    Attributes:
        calls: ``(jac_sq, number of units)`` for each time the layer ran. A layer that the model uses twice has two
            entries.
        linear: the module with the ``weight`` whose row norms count; None for the activation alone.
        spread: the linear map in front, of whose units a process may have a part (``torch.distributed.tensor``).
        may_leave_input: whether an activation that works in place may leave its input as it is, since nothing else
            uses it.
        nonlinearity: ``E‖J - E J‖_F² / E‖J‖_F²`` over the samples of the latest call; only when it is being measured.
    """

    def __init__(
        self,
        forward_pass: ForwardPass,
        linear: nn.Module | None,
        spread: nn.Module | None = None,
        may_leave_input: bool = False,
    ) -> None:
        self.forward_pass = forward_pass
        self.linear = linear
        self.spread = spread
        self.may_leave_input = may_leave_input
        self.calls: list[tuple[Tensor, int]] = []
        self.nonlinearity: float | None = None

    def polynomial(self, z: Tensor, coeffs: Tensor, rectified: bool = False) -> Tensor:
        """``p(z)``, with the Jacobian norm recorded; ``linear`` is the module that calls, or None."""
        row_sq = None if self.linear is None else squared_row_norms(self.linear.weight, z)  # type: ignore[arg-type]
        return self.apply(LearnablePolynomial(coeffs, rectified), z, row_sq)

    def apply(
        self,
        function: FixedActivation | LearnablePolynomial,
        z: Tensor,
        row_sq: RowSq,
        spatial: int | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """``f(z)``, with the Jacobian norm recorded; ``row_sq`` and ``spatial`` as in :class:`Source`."""
        if in_place and not self.may_leave_input:
            # Of a copy, since the backward needs z.
            z.copy_(self.apply(function, z.clone(), row_sq, spatial))
            forget_source(z)
            return z
        if self.forward_pass.outputs is not None:
            y = function.value(z)
            self.forward_pass.outputs.append(Output(self, y, spatial))
            return y
        if self.forward_pass.is_silent:
            return function.value(z)
        if spatial is None:
            y, jac_sq = function.with_norm(z, summed(row_sq))
            units = z.shape[-1]
        else:
            has_batch = z.dim() > spatial + 1
            y, jac_sq = function.with_norm_of_images(z if has_batch else z.unsqueeze(0), row_sq)
            if not has_batch:
                y, jac_sq = y.squeeze(0), jac_sq.squeeze(0)
            units = math.prod(z.shape[-1 - spatial :])
        if self.forward_pass.measures_nonlinearity:
            (_, slope) = function.scalar.derivatives(z.to(compute_dtype(z)), 1)
            self.nonlinearity = _relative_variance(slope, summed(row_sq), spatial)
        self.add(jac_sq, units)
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
            self.calls.append(_distributed.whole(jac_sq, units, self.spread))

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


class ActivationRecords:
    """The records of one activation: for each linear map that it serves, and under None for any other input.

    Attributes:
        by_linear: the records, by the name of the linear map; None for a linear map that is left out.
        spatial: of the input that belongs to no linear map, as :attr:`Source.spatial`.
        forward_pass: the regulariser's.
    """

    linear = None

    def __init__(self, forward_pass: ForwardPass) -> None:
        self.forward_pass = forward_pass
        self.by_linear: dict[str | None, JacobianRecord | None] = {}
        self.spatial: int | None = None

    def apply(
        self, function: FixedActivation | LearnablePolynomial, z: Tensor, in_place: bool = False
    ) -> Tensor | None:
        """``f(z)`` with the norm recorded where it belongs; None when no record is meant for this input."""
        source = source_of(z)
        if source is not None and source.linear in self.by_linear:
            record = self.by_linear[source.linear]
            return None if record is None else record.apply(function, z, source.row_sq, source.spatial, in_place)
        record = self.by_linear.get(None)
        return None if record is None else record.apply(function, z, None, self._spatial(z, source), in_place)

    def _spatial(self, z: Tensor, source: Source | None) -> int | None:
        if source is not None:
            return source.spatial
        # Without that many dimensions it is something else than the trace showed.
        return self.spatial if self.spatial is not None and z.dim() > self.spatial else None

    def polynomial(self, z: Tensor, coeffs: Tensor, rectified: bool = False) -> Tensor:
        """``p(z)``, with the norm recorded where it belongs."""
        y = self.apply(LearnablePolynomial(coeffs, rectified), z)
        return polynomial(z, coeffs, rectified=rectified) if y is None else y


def active_record(module: nn.Module) -> JacobianRecord | ActivationRecords | None:
    """The record of a module of this package, or None when nothing is to be recorded.

    Raises:
        RuntimeError: for a replica of :class:`torch.nn.DataParallel`.
    """
    record: JacobianRecord | ActivationRecords | None = getattr(module, "jacobian_record", None)
    # What an export would record are the fake tensors of its trace.
    if record is None or is_exporting() or not record.forward_pass.is_listening:
        return None
    refuse_replica(module)
    return record


def _over_positions(tap_sq: Tensor, spatial: int) -> Tensor:
    return tap_sq if tap_sq.dim() > 1 else tap_sq.view(-1, *(1,) * spatial)


def _relative_variance(slope: Tensor, row_sq: Tensor | None, spatial: int | None) -> float:
    """``E‖J - E J‖_F² / E‖J‖_F²`` for ``J = diag(slope) W``: 0 for a layer that acts linearly on these samples."""
    sample = slope.shape[-1:] if spatial is None else slope.shape[-1 - spatial :]
    slope = slope.reshape(-1, *sample)
    spread, size = slope.var(0, correction=0), slope.square().mean(0)
    if row_sq is not None:
        row_sq = _over_positions(row_sq, len(sample) - 1)
        spread, size = spread * row_sq, size * row_sq
    return (spread.sum() / size.sum()).item()

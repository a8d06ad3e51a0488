"""What stands in the place of a module's forward while a regulariser is attached.

Each is put on the instance (``module.forward``), where :meth:`torch.nn.Module.__call__` finds it: the module keeps its
class, its parameters and its hooks. A linear map marks its output with a
:class:`~chainzrule_kernels.nn.jacobian_record.Source`, what stands between hands the mark on, and an activation looks
it up. A function that a forward calls is met by a :class:`torch.overrides.TorchFunctionMode`, which is in force while
that forward runs.
"""

from __future__ import annotations

import abc
import contextlib
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from chainzrule_kernels import _distributed
from chainzrule_kernels._tracing import constant_while_running, is_exporting, show_to_function_modes
from chainzrule_kernels.dreg.recognition import (
    ACTIVATION_FUNCTIONS,
    CONVOLUTIONS,
    FUNCTIONS_HIDDEN_BY_DYNAMO,
    OTHER_NORM_FUNCTIONS,
    PART_FUNCTIONS,
    TRANSPARENT_FUNCTIONS,
    describe_call,
    dimension_of_parts,
    is_transformers_conv1d,
)
from chainzrule_kernels.nn.jacobian_record import (
    ActivationRecords,
    FixedActivation,
    ForwardPass,
    RowSq,
    Source,
    fixed_activation,
    set_source,
    source_of,
    summed,
    with_versions,
)
from chainzrule_kernels.ops.convolved_activation_dreg.definition import weighted
from chainzrule_kernels.ops.convolved_activation_dreg.op import ConvolutionInFront, convolution_in_front
from chainzrule_kernels.ops.squared_weights.op import squared_row_norms


class Interception(abc.ABC):
    """Stands in the place of a module's forward, and gives it back.

    Attributes:
        module: whose forward it is.
        forward_pass: the regulariser's.
    """

    def __init__(self, module: nn.Module, forward_pass: ForwardPass) -> None:
        self.module = module
        self.forward_pass = forward_pass
        self._is_attached = True
        # Of another interception of the same module: it goes on inside this one.
        self._inner: Interception | None = module.__dict__.get("forward")
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        # What an export would record are the fake tensors of its trace.
        if not self._is_attached or is_exporting() or not self.is_needed:
            return self.original(*args, **kwargs)
        return self.forward(*args, **kwargs)

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to do beside the module's own forward."""
        return self.forward_pass.is_listening

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward: trainers read which arguments a model takes."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        """That of the module's own forward, for which torch.export asks."""
        return inspect.unwrap(type(self.module).forward).__code__

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class."""
        if self._inner is not None:
            return self._inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward while the regulariser is attached."""

    def remove(self) -> None:
        """Give the forward back. Whoever has wrapped it since still gets the module's own."""
        self._is_attached = False
        if self.module.__dict__.get("forward") is self:
            if self._inner is None:
                del self.module.__dict__["forward"]
            else:
                self.module.forward = self._inner


class MarkingLinear(Interception):
    """A linear map that marks its output.

    Args:
        module: a :class:`torch.nn.Linear`, a convolution, or a ``Conv1D`` of transformers.
        forward_pass: the regulariser's.
        name: of the module in the model.
        with_norms: whether the mark has the squared row norms.
    """

    def __init__(self, module: nn.Module, forward_pass: ForwardPass, name: str, with_norms: bool) -> None:
        super().__init__(module, forward_pass)
        self.name = name
        self.with_norms = with_norms
        self.spatial = len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else None
        # Tensor parallelism takes the process's own part of the output in a hook, which loses the mark.
        weight = module._parameters.get("weight")  # no parameter where it is computed
        self._is_spread = weight is not None and not _distributed.is_plain(weight)
        self._handle = module.register_forward_hook(self._mark_part) if self._is_spread else None

    def remove(self) -> None:
        """Give the forward back, and take the hook off."""
        super().remove()
        if self._handle is not None:
            self._handle.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, marked."""
        # A parametrised weight is computed at each access, and spectral norm moves on each time.
        computed = parametrize.is_parametrized(self.module, "weight")
        with parametrize.cached() if computed and self.with_norms else contextlib.nullcontext():
            y = with_versions(self.original, *args, **kwargs)
            if not _distributed.is_plain(y):
                self._check_hook()
                return y
            with self._out_of_sight():
                row_sq = self._row_sq(_first(args, kwargs), y) if self.with_norms else None
                set_source(y, self.name, row_sq, self.spatial)
        return y

    def _out_of_sight(self) -> contextlib.AbstractContextManager[Any]:
        """Where no function mode sees what a plain weight is asked: each question would be a call of Python."""
        if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() == 0:
            return contextlib.nullcontext()
        weight = self.module._parameters.get("weight")
        return torch._C.DisableTorchFunction() if type(weight) is nn.Parameter else contextlib.nullcontext()

    def _check_hook(self) -> None:
        if not self._is_spread:
            raise RuntimeError(
                f"DREG: the weight of {self.name} was spread over processes after the regulariser had been attached. "
                "Attach it after parallelize_module"
            )

    def _mark_part(self, module: nn.Module, inputs: Any, y: Any) -> None:
        """Mark what the process has of the output."""
        if source_of(y) is not None:  # FSDP2 has the whole weight and output in the forward, as any other model
            return
        if not _distributed.is_plain(y):
            raise RuntimeError(
                f"DREG: the output of {self.name} is a distributed tensor, and no op of this package takes one. Leave "
                "use_local_output=True where the layer is parallelised"
            )
        row_sq = _distributed.squared_row_norms_of(module, y) if self.with_norms else None
        set_source(y, self.name, row_sq, None)

    def _row_sq(self, x: Tensor, y: Tensor) -> RowSq:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if isinstance(self.module, CONVOLUTIONS):
            convolution = self.module
            where = (convolution.stride, convolution.padding, convolution.dilation)
            return convolution_in_front(weight, x, *where, weight_stays=not self.forward_pass.shares_work)
        return squared_row_norms(weight.t() if is_transformers_conv1d(self.module) else weight, y)


class Handing(Interception):
    """What stands between a linear map and its activation: hands the mark on, without the norms behind a norm."""

    def __init__(self, module: nn.Module, forward_pass: ForwardPass, keeps_norms: bool) -> None:
        super().__init__(module, forward_pass)
        self.keeps_norms = keeps_norms

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, marked as its input was."""
        return call_and_hand_on(self.original, args, kwargs, self.keeps_norms)


class RecordingActivation(Interception):
    """The module of an activation, which computes the norm beside its output."""

    def __init__(
        self, module: nn.Module, forward_pass: ForwardPass, kind: str, records: ActivationRecords, in_place: bool
    ) -> None:
        super().__init__(module, forward_pass)
        self.function = fixed_activation(kind)
        self.records = records
        self.in_place = in_place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The activation, recorded where the input belongs to a layer."""
        y = apply_recorded(self.records, self.function, _first(args, kwargs), self.in_place)
        return self.original(*args, **kwargs) if y is None else y


class WatchingFunctions(Interception):
    """A module whose forward calls functions that matter.

    Args:
        module: whose forward it is.
        forward_pass: the regulariser's.
        records: for each activation function that belongs to a layer, by the function's name.
    """

    def __init__(self, module: nn.Module, forward_pass: ForwardPass, records: dict[str, ActivationRecords]) -> None:
        super().__init__(module, forward_pass)
        self.records = records

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, its calls of functions watched."""
        _show_hidden_calls()
        with _FunctionMode(self.records, type(self.module).__name__):
            return self.original(*args, **kwargs)


_WATCHED = frozenset(
    (*ACTIVATION_FUNCTIONS, F.batch_norm, *PART_FUNCTIONS, *TRANSPARENT_FUNCTIONS, *OTHER_NORM_FUNCTIONS)
)


@constant_while_running
def _show_hidden_calls() -> None:
    # At each call, since a forward that is not compiled itself may call a function that is.
    global _hidden_calls_are_shown
    if not _hidden_calls_are_shown:
        _hidden_calls_are_shown = show_to_function_modes(FUNCTIONS_HIDDEN_BY_DYNAMO)


_hidden_calls_are_shown = False


class _FunctionMode(TorchFunctionMode):
    """Records the calls of activations in the forward of a module of the class ``owner``."""

    def __init__(self, records: dict[str, ActivationRecords], owner: str) -> None:
        super().__init__()
        self.records = records
        self.owner = owner
        self._saving = _saving()
        self._with_gradients = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _WATCHED:
            return func(*args, **kwargs)
        if func in ACTIVATION_FUNCTIONS:
            records = self.records.get(ACTIVATION_FUNCTIONS[func])
            call = None if records is None else describe_call(func, args, kwargs)
            if records is not None and call is not None and call.kind is not None:
                y = apply_recorded(records, fixed_activation(call.kind), _first(args, kwargs), call.in_place)
                if y is not None:
                    self._refuse_checkpoint(call.name)
                    return y
        elif func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        elif func in PART_FUNCTIONS:
            return _parts(func, args, kwargs)
        elif func in TRANSPARENT_FUNCTIONS or func in OTHER_NORM_FUNCTIONS:
            return call_and_hand_on(func, args, kwargs, func in TRANSPARENT_FUNCTIONS)
        return func(*args, **kwargs)

    def _refuse_checkpoint(self, name: str) -> None:
        """Raise where a checkpoint has begun since: it will run the function again, and this mode will not be there.

        What PyTorch's own function saves then may pass for what was saved here: of tanh the output, for the input.
        """
        if torch.is_grad_enabled():
            saving = _saving()
            is_new = saving is not None and saving is not self._saving
            is_checkpoint = is_new and saving.__module__ == "torch.utils.checkpoint"
        else:
            is_checkpoint = self._with_gradients and _is_in_reentrant_checkpoint()
        if is_checkpoint:
            raise RuntimeError(
                f"DREG: the forward of a {self.owner} calls {name} inside of a checkpoint, which runs it again in the "
                "backward pass, where DREG does not see it. Give the checkpoint a module that calls the function, or "
                "make the activation a module"
            )


def _saving() -> Callable[[Tensor], Any] | None:
    """What packs the tensors that are saved for the backward now, if anything does."""
    # A compiled checkpoint is an operator of the graph, functions and all.
    hooks = None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def _is_in_reentrant_checkpoint() -> bool:
    module = sys.modules.get("torch.utils.checkpoint")
    if module is None or torch.compiler.is_compiling():
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not module.CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def apply_recorded(
    records: ActivationRecords, function: FixedActivation, z: Any, in_place: bool = False
) -> Tensor | None:
    """``f(z)``, recorded where ``z`` belongs to a layer, in the dtype that autocast would give; otherwise None."""
    if not isinstance(z, Tensor):
        return None
    if function.kind == "softplus" and z.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        source = source_of(z)
        z = z.float()
        if source is not None:
            set_source(z, source.linear, source.row_sq, source.spatial)
    return records.apply(function, z, in_place)


def hand_on(x: Any, y: Any, keeps_norms: bool) -> None:
    """Mark ``y`` as ``x`` is marked."""
    source = source_of(x)
    if source is not None and isinstance(y, Tensor):
        set_source(y, source.linear, source.row_sq if keeps_norms else None, source.spatial)


def call_and_hand_on(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], keeps_norms: bool) -> Any:
    """``function(*args, **kwargs)``, marked as the first argument is."""
    x = _first(args, kwargs)
    # What carries no mark may be an inference tensor, into which nothing can write outside of inference mode.
    y = function(*args, **kwargs) if source_of(x) is None else with_versions(function, *args, **kwargs)
    hand_on(x, y, keeps_norms)
    return y


def _parts(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Parts of a tensor, marked as it is: with the row norms of their own units, or of all for parts of the batch."""
    x = _first(args, kwargs)
    source = source_of(x) if isinstance(x, Tensor) else None
    parts = function(*args, **kwargs) if source is None else with_versions(function, *args, **kwargs)
    dimension = None if source is None else dimension_of_parts(function, args, kwargs)
    if source is None or dimension is None:
        return parts
    is_of_units = dimension % x.dim() == x.dim() - 1 - (source.spatial or 0)
    if not is_of_units and source.spatial is not None:
        return parts
    rows = summed(source.row_sq) if is_of_units else None
    if isinstance(parts, Tensor):
        set_source(parts, source.linear, source.row_sq if rows is None else rows[args[1][-1]], source.spatial)
        return parts
    if torch.compiler.is_compiling():
        # Dynamo lets no attribute be set on one of several results.
        parts = tuple(part.view_as(part) for part in parts)
    of_each = None if rows is None else rows.split([part.shape[dimension] for part in parts])
    for index, part in enumerate(parts):
        set_source(part, source.linear, source.row_sq if of_each is None else of_each[index], source.spatial)
    return parts


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm`, which folds into the norms of the mark that its input carries.

    Row ``j`` is scaled by ``gamma_j / sigma_j``, sigma detached.
    """
    source = source_of(input)
    if source is None or source.row_sq is None or input.numel() <= input.shape[1]:
        # One value for each channel is an error, and PyTorch's own function says so.
        own_arguments = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        return call_and_hand_on(F.batch_norm, own_arguments, {}, keeps_norms=True)
    _check_channels(input, source)
    # The same call that F.batch_norm makes. It returns 1/sigma of the batch, too.
    arguments = (input, weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled)
    y, _, inverse_sigma, _, _ = with_versions(torch._batch_norm_impl_index, *arguments)
    if torch.compiler.is_compiling():
        # Dynamo lets no attribute be set on one of several results.
        y = y.view_as(y)
    if not training:
        assert running_var is not None
        inverse_sigma = (running_var.to(source.row_sq.dtype) + eps).rsqrt()
    scale = inverse_sigma.detach().to(source.row_sq.dtype)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    row_sq, factor = source.row_sq, scale.square()
    scaled = row_sq.times(factor) if isinstance(row_sq, ConvolutionInFront) else weighted(row_sq, factor)
    set_source(y, source.linear, scaled, source.spatial)
    return y


def _check_channels(input: Tensor, source: Source) -> None:
    if source.spatial is None and input.dim() != 2:
        raise ValueError(
            f"DREG: a batch norm behind {source.linear} takes dimension 1 of {tuple(input.shape)} for the channels, "
            "and the linear layer's are the last: this layer's Jacobian norm cannot be had from row norms. Leave it "
            "out with layers=, or take variant='activation'"
        )


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")

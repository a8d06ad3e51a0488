r"""The accumulated Jacobian of each layer, by forward-mode differentiation of the whole model.

``G_l = ∂y_l/∂x`` is the Jacobian of a layer's output with respect to the model's input: ``diag(f') W G_{l-1}`` for
layers one behind the other, and what that becomes with residual sums, attention or norms between them. A tangent ``ẋ``
at the input arrives at the layer as ``ẏ_l = G_l ẋ``. So ``‖G_l‖_F²`` is ``Σ_t ‖G_l e_t‖²`` over the unit vectors of the
input, and ``E ‖G_l v‖²`` for a Gaussian ``v``.

The tangents run in a pass of their own behind the model's forward, with the same arguments, random numbers and
autocast, and on copies of the buffers: what the model returns and keeps is not touched.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from chainzrule_kernels.dreg.interception import Interception, hand_on
from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.nn.jacobian_record import ForwardPass, JacobianRecord, Output

Probes = int | str


class Start(Interception):
    """The module whose output is the ``x`` of the accumulated Jacobian, where the model's input has no tangents.

    Attributes:
        output: of the latest forward pass; only its shape, dtype and device matter.
        offset: what is added to the output while tangents run.
    """

    def __init__(self, module: nn.Module, forward_pass: ForwardPass) -> None:
        super().__init__(module, forward_pass)
        self.output: Tensor | None = None
        self.offset: Tensor | None = None

    @property
    def is_needed(self) -> bool:
        """Always: the shape is that of the model's own pass."""
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, with the offset while tangents run."""
        y = self.original(*args, **kwargs)
        if self.offset is not None:
            moved = y + self.offset
            hand_on(y, moved, keeps_norms=True)
            return moved
        self.output = y.detach()
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "output": None, "offset": None}


def find_start(model: nn.Module, name: str | None) -> nn.Module | None:
    """The module whose output takes the tangents when the model's input are no floating-point numbers.

    Raises:
        TypeError, ValueError: when there is no module of that name.
    """
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"start: expected the name of a module, got {type(name).__name__}")
        modules = dict(model.named_modules())
        if not name or name not in modules:
            raise ValueError(f"start: expected the name of a module in the {type(model).__name__}, got {name!r}")
        return modules[name]
    return next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)


def _has_version(value: Any) -> bool:
    """Whether PyTorch counts how often the value has been written to."""
    return isinstance(value, Tensor) and not value.is_inference()


class TangentPass:
    """What is needed to run tangents through the model as its latest forward pass ran it.

    Args:
        model: the regularised model.
        args, kwargs: of its forward.
        start: as found by :func:`find_start`; preferred over the model's input when ``start_is_chosen``.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        start: Start | None,
        start_is_chosen: bool,
    ) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.start = start
        self.key: int | str | None = None if start_is_chosen else _floating_argument(args, kwargs)
        if self.key is None and start is None:
            raise ValueError(
                "DREG: the variant 'accumulated' needs a floating-point tensor among the arguments of the model, or an "
                "embedding in it; name the module to start from with start="
            )
        self._versions = [(leaf, leaf._version) for leaf in tree_leaves((args, kwargs)) if _has_version(leaf)]
        self._random_state = torch.get_rng_state()
        self._grad = torch.is_grad_enabled()
        self._autocast = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")
        ]
        self._device_random_state = (
            torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        )

    def _input(self) -> Tensor:
        if isinstance(self.key, str):
            return self.kwargs[self.key]
        if self.key is not None:
            return self.args[self.key]
        assert self.start is not None
        if self.start.output is None:
            raise RuntimeError("DREG: the module named by start= did not run in the latest forward pass of the model")
        return torch.zeros_like(self.start.output)

    def run(self, forward_pass: ForwardPass, probes: Probes) -> list[tuple[JacobianRecord, Tensor, int]]:
        """``(record, ‖G_l‖_F² for each sample, units)`` for each run of a layer; estimated for a number of probes."""
        if any(leaf._version != version for leaf, version in self._versions):
            raise RuntimeError(
                "DREG: a tensor that the model was called with has been written to since, by the model's forward or "
                "behind it, and the variant 'accumulated' needs it as it was. Call penalty() before that, and clone "
                "what the forward overwrites"
            )
        x = self._input()
        # A string is "exact".
        directions = _unit_vectors(x) if isinstance(probes, str) else x.new_empty(probes, *x.shape).normal_()
        ran: list[Output] = []

        def squared_tangents(direction: Tensor) -> tuple[Tensor, ...]:
            def outputs(x: Tensor) -> tuple[Tensor, ...]:
                ran[:] = self._forward(x, forward_pass)
                return tuple(output.value for output in ran)

            tangents: tuple[Tensor, ...] = torch.func.jvp(outputs, (x,), (direction,))[1]
            return tuple(output.squared_norm(tangent) for output, tangent in zip(ran, tangents, strict=True))

        with self._as_in_the_forward_pass():
            if len(directions) == 1:
                squares = tuple(square.unsqueeze(0) for square in squared_tangents(directions[0]))
            else:
                # Every direction sees the same dropout.
                squares = torch.vmap(squared_tangents, randomness="same")(directions)
        return [
            (output.record, square.sum(0) if probes == "exact" else square.mean(0), output.units)
            for output, square in zip(ran, squares, strict=True)
        ]

    def _forward(self, x: Tensor, forward_pass: ForwardPass) -> list[Output]:
        """The outputs of the layers that run for the input ``x``."""
        args, kwargs = self.args, self.kwargs
        if isinstance(self.key, str):
            kwargs = {**kwargs, self.key: x}
        elif self.key is not None:
            args = (*args[: self.key], x, *args[self.key + 1 :])
        else:
            assert self.start is not None
            self.start.offset = x
        forward_pass.outputs = []
        # Made inside, since a transform allows no write into what was there before.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            with _replaced_buffers(self.model, buffers):
                self.model.forward(*args, **kwargs)
            return forward_pass.outputs
        finally:
            forward_pass.outputs = None
            if self.start is not None:
                self.start.offset = None

    @contextlib.contextmanager
    def _as_in_the_forward_pass(self) -> Iterator[None]:
        devices = [] if self._device_random_state is None else [torch.cuda.current_device()]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.set_rng_state(self._random_state)
            if self._device_random_state is not None:
                torch.cuda.set_rng_state(self._device_random_state)
            for device, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            stack.enter_context(_refused_checkpoints())
            # The fused attention kernels have no forward mode.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_PlainNorms())
            yield


_NO_CHECKPOINTS = (
    "DREG: the variant 'accumulated' does not go with activation checkpointing, which would run a part of the model "
    "again without its tangents. Switch it off, or take variant='layer'"
)


@contextlib.contextmanager
def _refused_checkpoints() -> Iterator[None]:
    """Raise for a checkpoint in the model.

    A checkpoint of torch 2.10 and 2.11, and a reentrant one of any version, fails before it asks for saved tensors, for
    want of a forward mode of its own.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_NO_CHECKPOINTS):
            yield
    except RuntimeError as error:
        if str(error) != _NO_CHECKPOINTS and _passed_a_checkpoint(error):
            raise RuntimeError(_NO_CHECKPOINTS) from error
        raise


def _passed_a_checkpoint(error: BaseException) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == "torch.utils.checkpoint" for frame in frames)


class _PlainNorms(TorchFunctionMode):
    """Norms by plain arithmetic.

    PyTorch's forward mode of layer, batch and instance norm takes mean and deviation in its formula for constants when
    it is differentiated again: the gradient of a tangent's norm would be silently wrong (torch 2.13).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = _PLAIN_NORMS.get(func)
        return func(*args, **(kwargs or {})) if plain is None else plain(*args, **(kwargs or {}))


def _normed(x: Tensor, dimensions: tuple[int, ...], eps: float) -> Tensor:
    values = x.to(compute_dtype(x))
    centred = values - values.mean(dimensions, keepdim=True)
    return centred * (centred.square().mean(dimensions, keepdim=True) + eps).rsqrt()


def _scaled(values: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if weight is not None:
        values = values * weight.reshape(shape)
    if bias is not None:
        values = values + bias.reshape(shape)
    return values.to(x.dtype)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    shape = tuple(normalized_shape)
    return _scaled(_normed(input, tuple(range(-len(shape), 0)), eps), input, weight, bias, shape)


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
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dimensions = (0, *range(2, input.dim()))
    return _scaled(_normed(input, dimensions, eps), input, weight, bias, (-1, *(1,) * (input.dim() - 2)))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _scaled(
        _normed(input, tuple(range(2, input.dim())), eps), input, weight, bias, (-1, *(1,) * (input.dim() - 2))
    )


_PLAIN_NORMS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}


@contextlib.contextmanager
def _replaced_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> Iterator[None]:
    """The model with other buffers, on which it may write."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in buffers]
    originals = [module._buffers[key] for module, key, _ in places]
    try:
        for module, key, name in places:
            module._buffers[key] = buffers[name]
        yield
    finally:
        for (module, key, _), original in zip(places, originals, strict=True):
            module._buffers[key] = original


def _floating_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """The position or name of the first floating-point tensor among the arguments."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in arguments:
        if isinstance(value, Tensor) and value.is_floating_point():
            return key
    return None


def _unit_vectors(x: Tensor) -> Tensor:
    """``(T, *x.shape)``: the unit vectors of one sample's input, the same for every sample of the batch."""
    sample = x.shape[1:] if x.dim() > 1 else x.shape
    size = math.prod(sample)
    vectors = torch.eye(size, dtype=x.dtype, device=x.device).view(size, *sample)
    return vectors.unsqueeze(1).expand(size, *x.shape) if x.dim() > 1 else vectors

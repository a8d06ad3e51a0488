"""One way from a public function to a kernel: operators that carry every derivative with them.

An operator of this package is registered with PyTorch's dispatcher once, here, together with

* its *definition* in plain PyTorch: what every kernel must reproduce, and what runs where no kernel exists,
* its *fake*: the outputs' shapes, dtypes and strides,
* its *vjp* and *jvp*: formulas for reverse and forward mode. The vjp of a forward operator calls a backward operator (a
  kernel); the vjp of a backward operator is plain PyTorch, differentiable to any order.

The formulas make a ``torch.autograd.Function``. Eager code calls it directly, which is what ``torch.func`` transforms
understand. ``torch.compile`` and ``torch.export`` see the bare operator, since Dynamo refuses a Function
that defines ``jvp``; the operator's Autograd kernel then applies the same Function. Registering with
``register_autograd`` alone would give silent zeros under forward-mode differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "chainzrule_kernels"
library = torch.library.Library(NAMESPACE, "DEF")

Definition = Callable[..., Any]
Arrange = Callable[[tuple[Any, ...], Tensor], Tensor]
Derivative = Callable[[tuple[Any, ...], tuple[bool, ...], Sequence[Tensor | None]], Sequence[Tensor | None]]
Tangent = Callable[[tuple[Any, ...], Sequence[Tensor | None]], Sequence[Tensor]]
StandIn = Callable[[tuple[Any, ...]], bool]

_PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))


def never(inputs: tuple[Any, ...]) -> bool:
    """The first input is needed itself."""
    return False


def contiguous(inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The output, contiguous, whatever the layout of the inputs."""
    return output.contiguous()


def as_it_is(inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The output, which the definition, the fake and the derivatives have laid out themselves."""
    return output


class Operator:
    """A registered operator. Calling it with the positional arguments of its schema runs it.

    In the schema the tensor arguments come first and no argument has a default: the dispatcher drops arguments that
    equal their default before it reaches a kernel.

    Args:
        schema: ``"name(Tensor z, …) -> (Tensor, …)"``.
        definition: the same signature in plain PyTorch.
        fake: the same signature; returns empty tensors of the right shape and dtype.
        vjp: ``(inputs, needs, grads) -> one gradient or None for each tensor input``. ``grads`` holds None for an
            output that was not used.
        jvp: ``(inputs, tangents) -> one tangent for each output``. ``tangents`` holds None for a constant input.
        saves: the positions of outputs that the derivatives need beside the inputs. The vjp and the jvp find them
            behind the inputs, and a second derivative reaches them as gradients that arrive for these outputs.
        arrange: ``(inputs, output) -> output``: the same values laid out in memory as every kernel lays them out.
        stands_in: ``inputs -> whether the derivatives may be taken at the first output in place of the first input``,
            which is then not kept: what comes next keeps the output in any case.
    """

    def __init__(
        self,
        schema: str,
        *,
        definition: Definition,
        fake: Definition,
        vjp: Derivative,
        jvp: Tangent,
        saves: Sequence[int] = (),
        arrange: Arrange = contiguous,
        stands_in: StandIn = never,
    ) -> None:
        library.define(schema)
        self.name = schema.split("(")[0]
        self.definition = definition
        self.vjp = vjp
        self.jvp = jvp
        self.python_kernel: Definition | None = None
        self.overload: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        eager_function, self.transformable_function = _differentiable_functions(
            self.overload, self._run, definition, vjp, jvp, tuple(saves), arrange, stands_in
        )
        # Function.apply adds only checks for torch.func transforms, which __call__ has made. They take microseconds.
        self.apply_eagerly: Callable[..., Any] = super(torch.autograd.Function, eager_function).apply  # type: ignore[misc]
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", _arranged(fake, arrange), lib=library)
        library.impl(self.name, self._autograd_kernel, "Autograd")
        self.definition_as_kernel = _arranged(definition, arrange)
        library.impl(self.name, self.definition_as_kernel, "CompositeExplicitAutograd")

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*inputs)
        if torch._C._are_functorch_transforms_active():
            if _nested_forward_mode():
                # PyTorch drops the outer level when a Function's jvp is differentiated in forward mode again.
                return self.definition(*inputs)
            return self.transformable_function.apply(*inputs)
        if _something_to_differentiate(inputs):
            return self.apply_eagerly(*inputs)
        return self._run(*inputs)

    def register_python_kernel(self, kernel: Definition) -> None:
        """Make a function the operator's kernel for CPU tensors.

        Eager calls on plain tensors go straight to it: the way through the dispatcher, from Python to C++ and back,
        takes longer than a small convolution.
        """
        library.impl(self.name, kernel, "CPU")
        self.python_kernel = kernel

    def _run(self, *inputs: Any) -> Any:
        """The kernel, in eager mode where nothing is left for autograd to do."""
        if self.python_kernel is not None and _plain(inputs):
            return self.python_kernel(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*inputs)

    def _autograd_kernel(self, *inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            # A torch.func transform inside a compiled function: PyTorch then differentiates the definition.
            return self.definition_as_kernel(*inputs)
        return self.apply_eagerly(*inputs)


def may_be_differentiated(*inputs: Any) -> bool:
    """Whether a derivative of a call with these inputs may be asked for, in eager code or a compiled function."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
    return torch._C._are_functorch_transforms_active() or _something_to_differentiate(inputs)


def _something_to_differentiate(inputs: tuple[Any, ...]) -> bool:
    """Whether an eager call must leave a trace for reverse or forward mode, or may go straight to the kernel."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for value in inputs:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def _plain(inputs: tuple[Any, ...]) -> bool:
    """Whether nobody but the kernel for CPU tensors wants to see this call: no mode, no tracer, no tensor subclass."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return False
    for value in inputs:
        if isinstance(value, Tensor) and (type(value) not in _PLAIN_TENSORS or not value.is_cpu):
            return False
    return True


def _nested_forward_mode() -> bool:
    """Whether two levels of ``torch.func.jvp`` (or ``jacfwd``) are open."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1


def _differentiable_functions(
    overload: Any,
    run: Definition,
    definition: Definition,
    vjp: Derivative,
    jvp: Tangent,
    saves: tuple[int, ...],
    arrange: Arrange,
    stands_in: StandIn,
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """The operator as an autograd Function: once for eager calls, once for ``torch.func`` transforms.

    They differ in how ``forward`` gets its context. Transforms need ``setup_context``; PyTorch then inspects the
    signature at every call, which costs several times as much as a small kernel.
    """
    tensor_count = sum(str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in overload._schema.arguments)
    argument_count = len(overload._schema.arguments)
    no_gradients = (None,) * argument_count
    no_constant_gradients = (None,) * (argument_count - tensor_count)
    single_output = len(overload._schema.returns) == 1

    def everything_saved(ctx: Any) -> tuple[Any, ...]:
        """The inputs, and behind them the outputs that were saved."""
        saved = ctx.saved_tensors
        return (*saved[:tensor_count], *ctx.constants, *saved[tensor_count:])

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            # Loops, since this stands between small kernels, and a generator takes several times as long.
            for grad in grads:
                if grad is not None:
                    break
            else:
                return no_gradients
            needs = ctx.needs_input_grad[:tensor_count]
            result = list(vjp(everything_saved(ctx), needs, grads))
            for index, need in enumerate(needs):
                if not need:
                    result[index] = None
            return (*result, *no_constant_gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            inputs = everything_saved(ctx)
            # PyTorch wants a tangent laid out as its output is.
            result = tuple(arrange(inputs, tangent) for tangent in jvp(inputs, tangents[:tensor_count]))
            return result[0] if single_output else result

    class Eager(Differentiable):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.constants = inputs[tensor_count:]
            # An output that was not used then arrives as None rather than as a tensor of zeros.
            ctx.set_materialize_grads(False)
            outputs = run(*inputs)
            first = outputs[0] if stands_in(inputs) else inputs[0]
            tensors = (first, *inputs[1:tensor_count])
            if saves:
                tensors += tuple(outputs[index] for index in saves)
            ctx.save_for_backward(*tensors)
            if forward_ad._current_level >= 0:
                ctx.save_for_forward(*tensors)
            return outputs

    class Transformable(Differentiable):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = (*inputs[:tensor_count], *(output[index] for index in saves))
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.constants = inputs[tensor_count:]
            ctx.set_materialize_grads(False)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
            # The kernels know no batch dimension inside the coefficients; the definition, being plain PyTorch, does.
            outputs = torch.vmap(definition, in_dims=in_dims)(*inputs)
            return outputs, 0 if single_output else (0,) * len(outputs)

    # A class of the operator's name, which PyTorch shows as grad_fn.
    name = overload._schema.name.split("::")[1]
    return type(name, (Eager,), {}), type(name, (Transformable,), {})


def _arranged(function: Definition, arrange: Arrange) -> Definition:
    """A definition or a fake, its outputs laid out as a kernel lays them out."""

    def kernel(*inputs: Any) -> Any:
        outputs = function(*inputs)
        if isinstance(outputs, Tensor):
            return arrange(inputs, outputs)
        return tuple(arrange(inputs, output) for output in outputs)

    return kernel

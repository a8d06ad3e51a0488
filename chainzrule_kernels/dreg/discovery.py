r"""Finding the layers of a model: every linear map with an activation behind it.

Nothing is run. Each module's own forward is traced by :mod:`torch.fx` with its children as leaves, and the trace is
followed with a note on each value: whose output it is, and what it went through since. Where a linear map's output
reaches an activation, that is a layer. So it does not matter whether the two stand in a :class:`torch.nn.Sequential`,
in a forward written by hand, or in different modules, and whether the activation is a module, a function, or a
function kept in an attribute.

A module whose forward cannot be traced to its end is opaque: what the trace showed until then is followed, its other
children on their own, and its other calls are unknown. :attr:`Discovery.skipped` names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import operator
import random
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from chainzrule_kernels.diagnostics import Table
from chainzrule_kernels.dreg.recognition import (
    CONVOLUTIONS,
    ELEMENTWISE_FUNCTIONS,
    NOT_OURS,
    OTHER_NORM_FUNCTIONS,
    PART_FUNCTIONS,
    POSSIBLE_ACTIVATIONS,
    PRODUCTS,
    TRANSPARENT_FUNCTIONS,
    ActivationCall,
    activation_of,
    attributes_of,
    describe_call,
    dimension_of_parts,
    is_batch_norm,
    is_closed,
    is_linear_map,
    is_other_norm,
    is_transparent,
    spatial_of,
    unchanged,
    why_no_linear_map,
)
from chainzrule_kernels.nn.activations import PolynomialActivation

__all__ = ["Between", "Discovery", "Layer", "SkippedActivation", "discover"]


@dataclass(frozen=True)
class Between:
    """Something that stands between a linear map and its activation.

    Attributes:
        name: of the module; of the module in whose forward it is called, for a function.
        module: the module.
        role: ``"transparent"`` (dropout, identity, a cast), ``"part"`` (a chunk, a slice), ``"batch norm"`` or
            ``"other norm"``.
        is_function: whether it is a function that the module's forward calls.
    """

    name: str
    module: nn.Module
    role: Literal["transparent", "part", "batch norm", "other norm"]
    is_function: bool = False

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm."""
        return self.role in ("batch norm", "other norm")


@dataclass(frozen=True)
class Layer:
    """A linear map with an activation behind it.

    Attributes:
        name: unique in the model. The name of the activation's module when it has one that serves this layer only;
            otherwise it says behind which linear map the activation stands.
        linear: the module with the ``weight``; None when what stands in front of the activation is no linear map.
        linear_name: as in ``model.named_modules()``.
        between: what stands between the two, in order.
        activation: the activation's module; None for a function. ``linear`` itself for a module that is both.
        owner: the module whose forward calls the function; the activation's module when there is one.
        owner_name: as in ``model.named_modules()``.
        function: the name of the function, or of the class of the activation's module.
        kind: one of :data:`~chainzrule_kernels.ACTIVATION_KINDS`; None for a learnable polynomial.
        folds: whether ``‖W_j‖²`` of the linear map, scaled by a batch norm between, gives the norm of the layer's
            Jacobian. Otherwise only ``Σ_j f'(z_j)²`` is known, and ``note`` says why.
        note: where the weight stands, or why it is not taken into account.
        spatial: for an activation with no linear map in front, the number of spatial dimensions of its input, feature
            maps ``(B, C, *spatial)``; None for ``(..., N)``, and where that is not known.
        in_place: whether the activation overwrites its input.
        overwrites_unseen: whether it does and nothing else uses its input, which it may then as well leave as it is.
    """

    name: str
    linear: nn.Module | None = field(repr=False)
    linear_name: str | None
    between: tuple[Between, ...] = field(repr=False)
    activation: nn.Module | None = field(repr=False)
    owner: nn.Module = field(repr=False)
    owner_name: str = field(repr=False)
    function: str
    kind: str | None
    folds: bool
    note: str
    spatial: int | None = field(default=None, repr=False)
    in_place: bool = field(default=False, repr=False)
    overwrites_unseen: bool = field(default=False, repr=False)

    @property
    def batch_norm(self) -> nn.Module | None:
        """The module of the batch norm between, if there is one."""
        return next((item.module for item in self.between if item.role == "batch norm"), None)

    @property
    def has_own_weight(self) -> bool:
        """Whether one module is linear map and activation, as :class:`chainzrule_kernels.nn.PolynomialLinear`."""
        return self.linear is not None and self.linear is self.activation

    @property
    def units(self) -> int | None:
        """The number of rows of the linear map, or of the polynomial's channels; None when neither is known."""
        if any(item.role == "part" for item in self.between):
            return None
        if self.linear is None or not self.folds:
            return getattr(self.activation, "num_channels", None)
        for name in ("out_features", "out_channels", "nf"):
            if hasattr(self.linear, name):
                return int(getattr(self.linear, name))
        return None


@dataclass(frozen=True)
class SkippedActivation:
    """An activation that is not regularised, a module that could not be looked into, or a linear map not called.

    Attributes:
        name: of the activation, as :attr:`Layer.name`; or of the module.
        module: the class of the module, or the name of the function.
        reason: why it is not regularised.
    """

    name: str
    module: str
    reason: str


@dataclass(frozen=True)
class Discovery:
    """What was found in a model.

    Attributes:
        layers: in the order in which the model runs them, as far as it could be followed.
        possible: further activations, with no linear map in front, that can be regularised for themselves
            (``Σ_j f'(z_j)²``) when they are asked for by name.
        skipped: every activation that is not in ``layers``, with the reason; every opaque module; and every linear map
            that no forward calls as it was traced, perhaps because an argument with a default decides.
    """

    layers: Table[Layer]
    possible: Table[Layer]
    skipped: Table[SkippedActivation]


def discover(model: nn.Module) -> Discovery:
    """Find the layers of ``model`` without running it.

    Raises:
        TypeError: when ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    analysis = _Analysis(model)
    analysis.follow_everything()
    return analysis.result()


# ---- values ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Memory:
    """What is known of the memory of a tensor, which others may share.

    Attributes:
        overwritten_by: the sites that overwrite it.
        is_followed: whether every use of it is known.
    """

    overwritten_by: list[_Site] = field(default_factory=list)
    is_followed: bool = True


@dataclass(eq=False)
class _Value:
    """What is known of a tensor in the model's forward.

    Attributes:
        front: what stands in front of whoever takes this value, for the note.
        linear: the name of the linear map whose output this is, or None.
        between: what it went through since.
        lost: why the rows of the linear map do not give the Jacobian's norm; empty when they do.
        spatial: as :attr:`Layer.spatial`.
        memory: where it lies.
        site: the activation whose output this is, or None.
        is_several: whether it is a tuple of parts.
    """

    front: str
    linear: str | None = None
    between: tuple[Between, ...] = ()
    lost: str = ""
    spatial: int | None = None
    memory: _Memory = field(default_factory=_Memory)
    site: _Site | None = None
    is_several: bool = False

    def through(self, item: Between, lost: str = "") -> _Value:
        # What a transparent module returns may be what it was given.
        memory = _Memory() if item.is_norm else self.memory
        return _Value(self.front, self.linear, (*self.between, item), self.lost or lost, self.spatial, memory)


@dataclass
class _Site:
    """One call of an activation, as it was followed."""

    owner_name: str
    owner: nn.Module
    activation: nn.Module | None
    call: ActivationCall
    value: _Value
    is_polynomial: bool = False
    is_seen_again: bool = False


# Whoever asks more often may be a loop that the same answer never ends.
_MOST_GUESSES = 1000


# Functions that take sizes and dtypes, of which torch.fx does not know that these may be values.
_MAKING_FUNCTIONS = (
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.full,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.arange,
    torch.linspace,
    torch.eye,
    torch.tensor,
    torch.finfo,
    torch.iinfo,
)


# What a forward may draw to choose its way, as stochastic depth does.
_DRAWING_FUNCTIONS = tuple(
    (module, name)
    for module, names in (
        (torch, ("rand", "randn", "randint", "randperm")),
        (random, ("random", "uniform", "randint", "randrange")),
    )
    for name in names
)
_drawing_functions_are_replaced = threading.RLock()


class _GuessingProxy(fx.Proxy):
    """A value that passes for what a forward needs to know of it: a number is 2, and so is the number of parts."""

    def __len__(self) -> int:
        return 2

    def __index__(self) -> int:
        return 2

    def __int__(self) -> int:
        return 2

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _LocalTracer(fx.Tracer):
    """Traces one module's own forward; its children are leaves.

    A condition on a value is taken to be ``guess``, and a number that the forward must know to be 2: the trace then
    shows one of the ways through the forward. That is enough to find layers, since the pairing is checked again
    whenever the model runs.

    Args:
        given: the names of the arguments that the forward is called with; the others have their defaults.
        guess: None to take nothing for granted.
        unwrapped: whether to trace what the decorators of the forward wrap.
        draws: whether to draw the random numbers that the forward asks for; otherwise they are values like others, so
            that what is found does not depend on them.
    """

    proxy_buffer_attributes = True
    trace_asserts = True

    def __init__(self, given: frozenset[str], guess: bool | None, unwrapped: bool, draws: bool) -> None:
        super().__init__(autowrap_functions=_MAKING_FUNCTIONS)
        self._autowrap_search.append(torch)
        self.given = given
        self.guess = guess
        self.unwrapped = unwrapped
        self.draws = draws
        self.guesses = 0

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[[], Any], list[Any]]:
        """The call of the forward, and no arguments to it: a placeholder for each parameter stands in the call."""
        _, *parameters = inspect.signature(root_fn).parameters.values()
        function = inspect.unwrap(root_fn) if self.unwrapped else root_fn
        args: list[Any] = [self.root]
        kwargs: dict[str, Any] = {}
        for position, parameter in enumerate(parameters, 1):
            value = self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.name not in self.given:
                continue
            # By its name behind one that is left out.
            if len(args) == position and parameter.kind is not parameter.KEYWORD_ONLY:
                args.append(value)
            else:
                kwargs[parameter.name] = value

        def call() -> Any:
            with contextlib.nullcontext() if self.draws else self._draws_as_values():
                return function(*args, **kwargs)

        return call, []

    @contextlib.contextmanager
    def _draws_as_values(self) -> Iterator[None]:
        thread = threading.get_ident()

        def value_of(function: Callable[..., Any]) -> Callable[..., Any]:
            def draw(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != thread:
                    return function(*args, **kwargs)
                # torch.fx has put a function of its own there, another one for each trace.
                return self.create_proxy("call_function", inspect.unwrap(function), args, kwargs)

            return draw

        # One trace at a time: another would take these for the originals.
        with _drawing_functions_are_replaced:
            originals = [(module, name, getattr(module, name)) for module, name in _DRAWING_FUNCTIONS]
            try:
                for module, name, function in originals:
                    setattr(module, name, value_of(function))
                yield
            finally:
                for module, name, function in originals:
                    setattr(module, name, function)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A leaf, or what a module computes that the forward has made for this call, as in ``nn.ReLU()(x)``."""
        is_part = m in (self.submodule_paths or {})
        return super().call_module(m, forward, args, kwargs) if is_part else forward(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: Any) -> bool:
        if self.guess is None:
            return super().to_bool(obj)
        self.guesses += 1
        if self.guesses > _MOST_GUESSES:
            raise RuntimeError("a loop in it ends by what it computes")
        return self.guess

    def iter(self, obj: Any) -> Iterator[Any]:
        return super().iter(obj) if self.guess is None else iter((obj[0], obj[1]))

    def create_arg(self, a: Any) -> Any:
        """What a graph can hold; of an object that it cannot, such as a cache, the name of its class."""
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return type(a).__name__

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self.guess is None else _GuessingProxy(node, self)


@dataclass(frozen=True)
class _Trace:
    """The trace of a module's own forward.

    Attributes:
        graph: what it calls.
        is_whole: whether the forward can go no other way, and keeps nothing.
        broken_by: why the trace ends before the forward does; empty when it does not.
        other_way: what it calls when its conditions on values are met, where that is something else.
    """

    graph: fx.Graph
    is_whole: bool
    broken_by: str = ""
    other_way: fx.Graph | None = None


def _trace(module: nn.Module) -> _Trace | str:
    """The trace of the module's own forward, or why there is none.

    The first attempt that reaches the end counts, otherwise the one that shows most.
    """
    if "forward" in module.__dict__:
        return "a forward was put on the instance"
    signature = _signature(module)
    if signature is None:
        return "its forward has no signature"
    longest: _Trace | None = None
    is_wrapped = hasattr(type(module).forward, "__wrapped__")
    unwrapping = (False, True) if is_wrapped else (False,)
    ways = itertools.product((False, True), _arguments_given(signature), unwrapping, (None, False, True))
    for draws, given, unwrapped, guess in ways:
        found = _attempt(module, _LocalTracer(given, guess, unwrapped, draws))
        if found.broken_by:
            longest = found if longest is None or len(found.graph.nodes) > len(longest.graph.nodes) else longest
        elif guess is None:
            is_whole = found.is_whole and not is_wrapped and len(given) == len(signature.parameters) - 1
            return dataclasses.replace(found, is_whole=is_whole)
        else:
            other = found if guess else _attempt(module, _LocalTracer(given, True, unwrapped, draws))
            shows_more = not _calls(other.graph) <= _calls(found.graph)
            return _Trace(found.graph, False, other_way=other.graph if shows_more else None)
    assert longest is not None
    return longest


def _attempt(module: nn.Module, tracer: _LocalTracer) -> _Trace:
    """A trace, as far as it got; ``is_whole`` says whether the module's attributes are what they were."""
    try:
        with unchanged(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = attributes_of(module)
            graph = tracer.trace(module)
            return _Trace(graph, attributes_of(module) == before)
    except Exception as error:  # a forward may do anything with what is not a tensor
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        # Of a forward that is no function of Python there is not even a beginning.
        return _Trace(getattr(tracer, "graph", fx.Graph()), False, reason)


def _calls(graph: fx.Graph) -> set[tuple[str, Any]]:
    return {(node.op, node.target) for node in graph.nodes if node.op.startswith("call")}


def _arguments_given(signature: inspect.Signature) -> list[frozenset[str]]:
    """Which arguments a forward may be called with: those without a default; one more; all that may be tensors."""
    _, *parameters = signature.parameters.values()
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    # Several positional arguments of any number are one here, unless others come before.
    required = [name for name in required if len(required) == 1 or signature.parameters[name].kind is not _ANY_NUMBER]
    # An argument that defaults to None may be one that every caller gives, and the forward then needs.
    optional = [parameter.name for parameter in parameters if parameter.default is None]
    choices = [required, [*required, *optional]] if required else [optional[:1], optional]
    return list(dict.fromkeys(map(frozenset, choices)))


_ANY_NUMBER = inspect.Parameter.VAR_POSITIONAL


def _signature(module: nn.Module) -> inspect.Signature | None:
    """That of the forward of the module's class, ``self`` included; None where there is none, as in a scripted one."""
    try:
        return inspect.signature(type(module).forward)
    except (TypeError, ValueError, AttributeError):
        return None


_IN_PLACE_OPERATORS = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem}
)


# ---- following ------------------------------------------------------------------------------------------------------


_UNCALLED = "does not call it"


class _Analysis:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.traces: dict[nn.Module, _Trace | str] = {}
        self.sites: list[_Site] = []
        self.reached: set[nn.Module] = set()
        self.running: set[nn.Module] = set()
        self.opaque: dict[str, str] = {}
        self.uncalled: dict[str, str] = {}

    def follow_everything(self) -> None:
        self.call(self.model, [_Value("nothing in front of it")])
        for name, module in self.modules.items():
            # Those of a module that could not be traced, or that no trace reached.
            if module not in self.reached:
                reason = self._why_unknown(name)
                if is_linear_map(module) and reason.endswith(_UNCALLED):
                    self.uncalled[name] = reason.replace("in front of it", "behind it")
                self.call(module, [_Value(reason)])

    def _why_unknown(self, name: str) -> str:
        parent = name.rpartition(".")[0]
        while parent and parent not in self.opaque and isinstance(self.modules[parent], nn.ModuleList | nn.ModuleDict):
            parent = parent.rpartition(".")[0]
        shown = f"{parent or 'the model'}, a {type(self.modules[parent]).__name__},"
        if parent in self.opaque:
            return f"what stands in front of it is unknown: the forward of {shown} cannot be traced"
        if isinstance(self.modules[parent], nn.ModuleList | nn.ModuleDict):
            return f"what stands in front of it is unknown: {shown} has no forward"
        return f"what stands in front of it is unknown: the forward of {shown} {_UNCALLED}"

    def call(self, module: nn.Module, arguments: list[_Value]) -> _Value:
        """The value that the module returns; notes the activations on the way."""
        name = self.names[module]
        self.reached.add(module)
        value = arguments[0] if arguments else _Value("nothing in front of it")
        if hasattr(type(module), "jacobian_record"):
            return self._polynomial(name, module, value)
        if is_linear_map(module):
            self._close(module)
            return _Value(name, linear=name, spatial=spatial_of(module))
        if is_transparent(module):
            return value.through(Between(name, module, "transparent"))
        if is_batch_norm(module):
            return self._batch_norm(value, Between(name, module, "batch norm"))
        if is_other_norm(module):
            self._close(module)
            return self._other_norm(value, Between(name, module, "other norm"), type(module).__name__)
        call = activation_of(module)
        if call is not None:
            self._close(module)
            return self._activation(_Site(name, module, module, call, value))
        spatial = spatial_of(module)
        other = _Value(f"{name or 'the model'} in front of it, {why_no_linear_map(module)}", spatial=spatial)
        if is_closed(module):
            self._close(module)
            return other
        if module in self.running:  # a module that calls itself
            return other
        trace = self._trace(module)
        reason = trace if isinstance(trace, str) else trace.broken_by
        if reason:
            for argument in arguments:
                argument.memory.is_followed = False
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                self.opaque[name] = reason
        if isinstance(trace, str):
            return other
        self.running.add(module)
        try:
            result = self._follow(name, module, trace.graph, trace.is_whole, arguments) or other
            if trace.other_way is not None:
                self._follow(name, module, trace.other_way, False, arguments)
            # What a subclass makes of the product with its weight is no longer that.
            return other if isinstance(module, (nn.Linear, *CONVOLUTIONS)) else result
        finally:
            self.running.discard(module)

    def _close(self, module: nn.Module) -> None:
        """What is inside a known module is no business of its own."""
        self.reached.update(module.modules())

    def _trace(self, module: nn.Module) -> _Trace | str:
        if module not in self.traces:
            self.traces[module] = _trace(module)
        return self.traces[module]

    def _follow(
        self, name: str, module: nn.Module, graph: fx.Graph, is_whole: bool, arguments: list[_Value]
    ) -> _Value | None:
        values: dict[fx.Node, _Value] = {}
        given = iter(arguments)
        result: _Value | None = None
        for node in graph.nodes:
            for used in node.all_input_nodes:
                for site in values[used].memory.overwritten_by:
                    site.is_seen_again = True
            if node.op == "placeholder":
                values[node] = next(given, None) or _Value("nothing in front of it")
            elif node.op == "get_attr":
                values[node] = _Value("a parameter in front of it")
            elif node.op == "call_module":
                child = module.get_submodule(node.target)
                passed = _by_position(child, node)
                inputs = [_value_of(argument, values) for argument in passed]
                values[node] = self.call(child, inputs)
                # A hook may keep what it is shown.
                for shown in [*inputs, values[node]] if child._forward_hooks else inputs:
                    if child._forward_hooks or child._forward_pre_hooks:
                        shown.memory.is_followed = False
            elif node.op == "output":
                result = values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            else:
                values[node] = self._function(name, module, node, values)
            if node in values and not is_whole:
                values[node].memory.is_followed = False
        return result

    def _function(self, name: str, module: nn.Module, node: fx.Node, values: dict[fx.Node, _Value]) -> _Value:
        function = getattr(Tensor, str(node.target), node.target) if node.op == "call_method" else node.target
        label = getattr(function, "__name__", str(node.target))
        first = node.args[0] if node.args else node.kwargs.get("input")
        value = values.get(first) if isinstance(first, fx.Node) else None
        if value is None:
            return _Value(f"the result of {label} in front of it")
        if function in PRODUCTS:
            self._product([values[used] for used in node.all_input_nodes])
        # It may be a view.
        spatials = (values[used].spatial for used in node.all_input_nodes if function in ELEMENTWISE_FUNCTIONS)
        spatial = next((found for found in spatials if found is not None), None)
        other = _Value(f"the result of {label} in front of it", spatial=spatial, memory=value.memory)
        call = describe_call(function, node.args, node.kwargs)
        if call is not None:
            return self._activation(_Site(name, module, None, call, value))
        if function in POSSIBLE_ACTIVATIONS and value.linear is not None:
            self.sites.append(_Site(name, module, None, ActivationCall(label.rstrip("_"), None, NOT_OURS), value))
        if function in TRANSPARENT_FUNCTIONS:
            return value.through(Between(name, module, "transparent", is_function=True))
        if value.is_several and function is operator.getitem and isinstance(node.args[1], int):
            return dataclasses.replace(value, is_several=False)
        if function in PART_FUNCTIONS and _keeps_rows(value, dimension_of_parts(function, node.args, node.kwargs)):
            part = value.through(Between(name, module, "part", is_function=True))
            return dataclasses.replace(part, is_several=function is not operator.getitem)
        if function is torch.nn.functional.batch_norm:
            return self._batch_norm(value, Between(name, module, "batch norm", is_function=True))
        if function in OTHER_NORM_FUNCTIONS:
            return self._other_norm(value, Between(name, module, "other norm", is_function=True), label)
        if _works_in_place(node, function) and isinstance(first, fx.Node):
            values[first] = other
        return other

    def _batch_norm(self, value: _Value, item: Between) -> _Value:
        if value.linear is None:
            front = f"{_shown(item)} in front of it, with no linear layer or convolution in front of that"
            return _Value(front, spatial=value.spatial if item.is_function else spatial_of(item.module, value.spatial))
        folded = any(between.role == "batch norm" for between in value.between)
        return value.through(item, "two batch norms stand between" if folded else "")

    def _other_norm(self, value: _Value, item: Between, norm: str) -> _Value:
        if value.linear is None:
            front = f"{item.name} in front of it, a {norm}, has no linear layer or convolution in front of it"
            return _Value(front, spatial=value.spatial)
        return value.through(
            item, f"{item.name} in front of it, a {norm}, does not fold into the weight of {value.linear}"
        )

    def _product(self, factors: list[_Value]) -> None:
        """``z f(z)`` is an activation of its own: ``z sigmoid(z)`` is silu."""
        for factor in factors:
            site = factor.site
            if site is not None and site.activation is None and site.value in factors:
                reason = "its result is multiplied by its input, which makes another activation of it"
                site.call = ActivationCall(site.call.name, None, reason, site.call.in_place)

    def _activation(self, site: _Site) -> _Value:
        self.sites.append(site)
        if site.call.in_place:
            site.value.memory.overwritten_by.append(site)
        return _Value(f"{self._label(site)} in front of it is an activation", spatial=site.value.spatial, site=site)

    def _polynomial(self, name: str, module: nn.Module, value: _Value) -> _Value:
        self._close(module)
        if hasattr(module, "weight") and not isinstance(module, PolynomialActivation):
            value = _Value("", linear=name, spatial=spatial_of(module))
        site = _Site(name, module, module, ActivationCall(type(module).__name__, None), value, is_polynomial=True)
        self.sites.append(site)
        return _Value(f"{self._label(site)} in front of it is an activation", spatial=value.spatial)

    def _label(self, site: _Site) -> str:
        if site.activation is not None:
            return site.owner_name or "the model"
        return f"{site.call.name} in {site.owner_name or 'the model'}"

    # ---- the result -------------------------------------------------------------------------------------------------

    def result(self) -> Discovery:
        layers: dict[Any, Layer] = {}
        possible: dict[Any, Layer] = {}
        skipped: dict[Any, SkippedActivation] = {}
        # An activation that serves several linear maps cannot give its name to all of them.
        served: dict[nn.Module, set[str | None]] = {}
        for site in self.sites:
            if site.activation is not None:
                served.setdefault(site.activation, set()).add(site.value.linear)
        for site in self.sites:
            shared = site.activation is None or len(served[site.activation]) > 1
            name = self._label(site)
            if shared and site.value.linear is not None:
                label = site.owner_name if site.activation is not None else site.call.name
                name = f"{label} behind {site.value.linear}"
            key = (site.owner, site.call.name, site.value.linear)
            layer = self._layer(name, site)
            reason = site.call.reason
            if not reason and (site.value.linear is not None or site.is_polynomial):
                layers[key] = _combined(layers[key], layer) if key in layers else layer
                continue
            skipped.setdefault(
                (*key, reason or site.value.front), SkippedActivation(name, site.call.name, reason or site.value.front)
            )
            if not reason:
                possible.setdefault(key, layer)
        for name, reason in self.uncalled.items():
            skipped[name] = SkippedActivation(name, type(self.modules[name]).__name__, reason)
        for name, reason in self.opaque.items():
            module = type(self.modules[name]).__name__
            skipped[name] = SkippedActivation(
                name or "the model",
                module,
                f"not all that its forward calls is known, since it cannot be traced to its end: {_shortened(reason)}",
            )
        taken = {(layer.owner, layer.function) for layer in layers.values() if layer.linear is None}
        return Discovery(
            Table(layers.values()),
            Table(layer for layer in possible.values() if (layer.owner, layer.function) not in taken),
            Table(skipped.values()),
        )

    def _layer(self, name: str, site: _Site) -> Layer:
        value = site.value
        # Coefficients for each channel are those of the last dimension.
        takes_rows = value.linear is not None or getattr(site.activation, "num_channels", None) is not None
        own = site.is_polynomial and value.linear == site.owner_name
        note = "its own weight" if own else f"the weight of {value.linear}"
        if value.linear is None:
            note = value.front
        elif value.lost:
            note = value.lost
        else:
            names = {item.role: item.name for item in value.between}
            note = f"a part of {note}" if "part" in names else note
            note = f"{note}, scaled by {names['batch norm']}" if "batch norm" in names else note
        return Layer(
            name=name,
            linear=None if value.linear is None else self.modules[value.linear],
            linear_name=value.linear,
            between=value.between,
            activation=site.activation,
            owner=site.owner,
            owner_name=site.owner_name,
            function=site.call.name,
            kind=site.call.kind,
            folds=value.linear is not None and not value.lost,
            note=note,
            spatial=None if takes_rows else value.spatial,
            in_place=site.call.in_place,
            overwrites_unseen=site.call.in_place and value.memory.is_followed and not site.is_seen_again,
        )


def _combined(one: Layer, other: Layer) -> Layer:
    """Two ways from the same linear map to the same activation; the weight folds if it does on both."""
    chosen = other if one.folds else one
    return dataclasses.replace(
        chosen,
        between=tuple(dict.fromkeys((*one.between, *other.between))),
        overwrites_unseen=one.overwrites_unseen and other.overwrites_unseen,
    )


def _by_position(child: nn.Module, call: fx.Node) -> list[Any]:
    """The arguments of a call, in the order in which the forward of the child takes them."""
    signature = _signature(child)
    try:
        bound = None if signature is None else signature.bind(child, *call.args, **call.kwargs)
    except TypeError:  # the call itself will say so
        bound = None
    if bound is None:
        return [*call.args, *call.kwargs.values()]
    bound.apply_defaults()
    _, *arguments = bound.arguments.items()
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    # One placeholder stands for any number of positional arguments.
    return [next(iter(value), None) if kinds[name] is _ANY_NUMBER else value for name, value in arguments]


def _value_of(argument: Any, values: dict[fx.Node, _Value]) -> _Value:
    if isinstance(argument, fx.Node):
        return values[argument]
    return _Value("nothing in front of it")


def _keeps_rows(value: _Value, dimension: int | None) -> bool:
    """Whether parts along a dimension are rows of a linear map, or samples: of feature maps only channels are."""
    if value.linear is None or dimension is None or value.is_several:
        return False
    return value.spatial is None or dimension in (1, -1 - value.spatial)


def _works_in_place(node: fx.Node, function: Any) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return function in _IN_PLACE_OPERATORS


def _shortened(reason: str) -> str:
    return textwrap.shorten(reason, 100, placeholder=" …")


def _shown(item: Between) -> str:
    return f"{item.name or 'the model'}, a {type(item.module).__name__},"

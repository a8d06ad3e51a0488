r"""A linear layer and the activation behind it as one module, put in the place of both, and taken out again.

The fused module stands where the linear layer stood, with its parameters under their names; where the activation stood
there is an identity, with the activation's parameters under their names. So the keys of the ``state_dict`` stay, the
parameters are the same objects, and an optimizer that holds them goes on.

What it is good for: without gradients the activation works in the memory of the matrix product, so that an evaluation
needs less of it; and :class:`chainzrule_kernels.DREG` finds a layer that computes its Jacobian norm itself, with
nothing put on the model's modules. In training without DREG a swapped model runs the same kernels as the plain one.
"""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from chainzrule_kernels.diagnostics import Table
from chainzrule_kernels.dreg.attachment import attached_interception
from chainzrule_kernels.dreg.recognition import activation_of, unchanged
from chainzrule_kernels.nn import Polynomial
from chainzrule_kernels.nn.jacobian_record import (
    ActivationRecords,
    FixedActivation,
    JacobianRecord,
    LearnablePolynomial,
    active_record,
)
from chainzrule_kernels.ops.linear_activation_dreg.op import linear_activation_dreg
from chainzrule_kernels.ops.linear_polynomial_dreg.op import linear_polynomial_dreg
from chainzrule_kernels.ops.polynomial.op import polynomial
from chainzrule_kernels.ops.squared_weights.op import squared_row_norms

__all__ = ["AbsorbedActivation", "SwapRow", "SwappedLinear", "swap", "unswap"]


@dataclass(frozen=True)
class SwapRow:
    """One row of what :func:`swap` returns.

    Attributes:
        linear: the name of the linear layer, as in ``model.named_modules()``; None for an activation without one.
        activation: the name of the activation; None for a linear layer without one.
        function: what the activation computes, ``"gelu"`` for one.
        swapped: whether the two were replaced.
        note: why not.
    """

    linear: str | None
    activation: str | None
    function: str | None
    swapped: bool
    note: str


def swap(model: nn.Module) -> Table[SwapRow]:
    """Replace each linear layer and the activation behind it by one fused module, in place.

    Args:
        model: any module. A pair is a :class:`torch.nn.Linear` and an activation module of one of the
            :data:`~chainzrule_kernels.ACTIVATION_KINDS`, or a :class:`chainzrule_kernels.nn.Polynomial`, to which alone
            the linear layer's output goes, with nothing but identities between. The forward that calls them may be
            that of a :class:`torch.nn.Sequential` or one written by hand; it is traced, and nothing is run.

    Returns:
        One row for each linear layer and each activation module, with the reason where nothing was replaced; print the
        table to read it.

    Raises:
        TypeError: when ``model`` is not a module.
        ValueError: when a regulariser is attached to it: swap first, regularise then.

    Outputs, gradients, parameters, ``state_dict`` and the training mode stay what they are; activations of other
    libraries are replaced by PyTorch's, which may round in another way. Modules with hooks are left alone, since a hook
    would see other values, and so are subclasses of ``Linear``. Swap before ``torch.compile``,
    DistributedDataParallel and ``fully_shard``. :func:`unswap` takes it back.
    """
    _check(model)
    calls = _Calls(model)
    rows: list[SwapRow] = []
    # All is decided before anything changes.
    pairs = calls.pairs()
    fused = {linear: SwappedLinear(linear, activation, function) for linear, activation, function in pairs}
    absorbed = {activation: AbsorbedActivation(activation) for _, activation, _ in pairs}
    names = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        function = None if isinstance(module, nn.Linear) else _function_of(module)
        if isinstance(module, nn.Linear):
            if module in fused:
                partner = fused[module].activation
                rows.append(SwapRow(name, names[partner], fused[module].function, True, ""))
            else:
                rows.append(SwapRow(name, None, None, False, calls.reasons[module]))
        elif function is not None and module not in absorbed:
            rows.append(SwapRow(None, name, function, False, calls.reasons[module]))
    for owner in list(model.modules()):
        for slot, child in owner._modules.items():
            if child in fused:
                owner._modules[slot] = fused[child]
            elif child in absorbed:
                owner._modules[slot] = absorbed[child]
    return Table(rows)


def unswap(model: nn.Module) -> int:
    """Put back the very modules that :func:`swap` replaced, with the parameters as they are now.

    Args:
        model: what :func:`swap` was called with, a copy of it, or something that contains it.

    Returns:
        How many pairs were put back.

    Raises:
        TypeError: when ``model`` is not a module.
        ValueError: when a regulariser is attached to it.
    """
    _check(model)
    count = 0
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if isinstance(child, SwappedLinear | AbsorbedActivation):
                original = child.original
                original.train(child.training)
                owner._modules[name] = original
                count += isinstance(child, SwappedLinear)
    return count


class SwappedLinear(nn.Module):
    r"""``y = f(x Wᵀ + b)``: a linear layer with the activation that stood behind it.

    Made by :func:`swap`.

    Attributes:
        weight, bias: those of the linear layer.
        function: what the activation computes: one of :data:`chainzrule_kernels.ACTIVATION_KINDS`, or
            ``"polynomial"``.
    """

    weight: Tensor
    bias: Tensor | None
    jacobian_record: JacobianRecord | ActivationRecords | None = None  # set on the instance by DREG

    def __init__(self, linear: nn.Linear, activation: nn.Module, function: str) -> None:
        super().__init__()
        # One dictionary for both: what a conversion, load_state_dict or fully_shard puts there is there for both.
        self._parameters = linear._parameters
        self.training = linear.training
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.function = function
        # In a tuple they are no submodules, which would add keys to the state_dict.
        self._originals = (linear, activation)

    @property
    def original(self) -> nn.Module:
        """The linear layer that stood here."""
        return self._originals[0]

    @property
    def activation(self) -> nn.Module:
        """The activation that stood behind it."""
        return self._originals[1]

    @property
    def coeffs(self) -> Tensor | None:
        """The coefficients of the polynomial; None for a fixed activation."""
        return self.activation._parameters.get("coeffs")

    def forward(self, x: Tensor) -> Tensor:
        """``f(x Wᵀ + b)``."""
        weight, bias, coeffs, record = self.weight, self.bias, self.coeffs, active_record(self)
        if isinstance(record, JacobianRecord) and record.linear is self:
            if not record.forward_pass.measures_nonlinearity:
                if coeffs is None:
                    y, jac_sq = linear_activation_dreg(x, weight, bias, self.function)
                else:
                    y, jac_sq = linear_polynomial_dreg(x, weight, bias, coeffs)
                record.add(jac_sq, self.out_features)
                return y
            row_sq = squared_row_norms(weight, x)
        else:
            row_sq = None
        z = F.linear(x, weight, bias)
        if isinstance(record, JacobianRecord):
            function = FixedActivation(self.function) if coeffs is None else LearnablePolynomial(coeffs)
            return record.apply(function, z, row_sq)
        if coeffs is not None:
            return polynomial(z, coeffs)
        # Nobody else has seen z. Under autocast the activation may have another dtype than z.
        overwrite = not z.requires_grad and not torch.is_autocast_enabled(z.device.type)
        out_of_place, in_place = _FUNCTIONS[self.function]
        return in_place(z) if overwrite else out_of_place(z)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"function={self.function!r}"
        )


class AbsorbedActivation(nn.Module):
    """The identity, in the place of an activation that a :class:`SwappedLinear` computes.

    Attributes:
        original: the activation that stood here, whose parameters it has.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self._parameters = activation._parameters
        self._buffers = activation._buffers
        self.training = activation.training
        self._originals = (activation,)

    @property
    def original(self) -> nn.Module:
        """The activation that stood here."""
        return self._originals[0]

    def forward(self, y: Tensor) -> Tensor:
        """What it was given."""
        return y

    def extra_repr(self) -> str:
        """The activation, for printing."""
        return repr(self.original)


# ---- what can be replaced --------------------------------------------------------------------------------------------

Function = Callable[[Tensor], Tensor]

# PyTorch's own activations, into a new tensor and into the memory of their argument.
_FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "relu": (F.relu, torch.relu_),
    "gelu": (F.gelu, torch.ops.aten.gelu_.default),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z: torch.ops.aten.gelu_.default(z, approximate="tanh"),
    ),
    "silu": (F.silu, lambda z: F.silu(z, inplace=True)),
    "tanh": (torch.tanh, torch.tanh_),
    "sigmoid": (torch.sigmoid, torch.sigmoid_),
    "softplus": (F.softplus, lambda z: torch.ops.aten.softplus.out(z, out=z)),
    "mish": (F.mish, lambda z: F.mish(z, inplace=True)),
}


def _function_of(module: nn.Module) -> str | None:
    """The kind of an activation, ``"polynomial"``, or None for anything else."""
    if isinstance(module, AbsorbedActivation | SwappedLinear):
        return None
    if type(module) is Polynomial:
        return "polynomial"
    call = activation_of(module)
    return None if call is None else call.kind


class _LocalTracer(fx.Tracer):
    """Traces one module's own forward; its children are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass(frozen=True)
class _Call:
    """A call of a module, in the trace of the forward of another."""

    owner: nn.Module
    node: fx.Node


class _Calls:
    """Who calls what in a model, and which linear layers and activations can become one.

    Attributes:
        reasons: for each linear layer and each activation that cannot, why.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.reasons: dict[nn.Module, str] = {}
        self._calls: dict[nn.Module, list[_Call]] = {module: [] for module in self.names}
        self._opaque: dict[nn.Module, str] = {}
        for owner in self.names:
            if owner._modules:
                self._trace(owner)

    def _trace(self, owner: nn.Module) -> None:
        try:
            if "forward" in owner.__dict__:
                raise ValueError("it was put on the instance")
            with unchanged(owner), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = _LocalTracer().trace(owner, concrete_args=_defaults(owner))
        except Exception as error:  # a forward may do anything with what is not a tensor
            self._opaque[owner] = textwrap.shorten(str(error) or type(error).__name__, 80, placeholder=" …")
            return
        for node in graph.nodes:
            if node.op == "call_module":
                self._calls[owner.get_submodule(str(node.target))].append(_Call(owner, node))

    def pairs(self) -> list[tuple[nn.Linear, nn.Module, str]]:
        """The linear layers, each with its activation and what that computes; fills :attr:`reasons` with the others."""
        partners: dict[nn.Linear, nn.Module] = {}
        served: dict[nn.Module, set[fx.Node]] = {}
        for module in self.names:
            if isinstance(module, nn.Linear):
                found = self._activation_behind(module)
                if isinstance(found, str):
                    self.reasons[module] = found
                else:
                    partners[module], nodes = found
                    served.setdefault(partners[module], set()).update(nodes)
        for module in self.names:
            if not isinstance(module, nn.Linear) and _function_of(module) is not None:
                if module not in served:
                    self.reasons[module] = self._why_uncalled(module) or "no torch.nn.Linear alone in front of it"
                elif served[module] != {call.node for call in self._calls[module]}:
                    self.reasons[module] = f"{self.names[module]} stands behind something else as well"
                else:
                    self.reasons[module] = self._own_reason(module)
        pairs = []
        for linear, activation in partners.items():
            self.reasons[linear] = self._own_reason(linear) or self.reasons[activation]
            if self.reasons[linear]:
                # An activation that cannot go from one place stays in all of them.
                self.reasons[activation] = self.reasons[activation] or self.reasons[linear]
        for linear, activation in partners.items():
            self.reasons[linear] = self.reasons[linear] or self.reasons[activation]
            function = _function_of(activation)
            if not self.reasons[linear] and function is not None:
                pairs.append((linear, activation, function))
        return pairs

    def _activation_behind(self, linear: nn.Linear) -> tuple[nn.Module, list[fx.Node]] | str:
        """The activation to which every output of ``linear`` goes, and its calls; or why there is none."""
        reason = self._why_uncalled(linear)
        if reason:
            return reason
        found: dict[nn.Module, list[fx.Node]] = {}
        for call in self._calls[linear]:
            node = call.node
            module: nn.Module = linear
            while module is linear or _is_identity(module):
                users = list(node.users)
                if len(users) != 1:
                    return "its output is used more than once" if users else "its output is not used"
                (node,) = users
                if node.op != "call_module":
                    owner = self.names[call.owner] or "the model"
                    what = f"the end of {owner}" if node.op == "output" else f"a call of {_label(node)} in {owner}"
                    return f"{what} behind it, no activation module"
                module = call.owner.get_submodule(str(node.target))
            if _function_of(module) is None or len(node.all_input_nodes) != 1:
                return f"{self.names[module]} behind it, a {type(module).__name__}: not one of the known activations"
            found.setdefault(module, []).append(node)
        if len(found) > 1:
            return f"different activations behind it: {', '.join(self.names[module] for module in found)}"
        return next(iter(found.items()))

    def _why_uncalled(self, module: nn.Module) -> str:
        if self._calls[module]:
            return ""
        parent = self.names[module].rpartition(".")[0]
        for owner, reason in self._opaque.items():
            if self.names[owner] == parent:
                return f"the forward of {parent or 'the model'} cannot be traced: {reason}"
        return "no forward that could be traced calls it"

    def _own_reason(self, module: nn.Module) -> str:
        """Why a module is to be left alone for what it is itself; empty if it is not."""
        name = self.names[module]
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}, a class of its own"
        if "forward" in module.__dict__:
            return f"{name} has a forward put on it"
        return f"{name} has hooks, which would see other values" if _has_hooks(module) else ""


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


def _defaults(module: nn.Module) -> dict[str, None]:
    """The arguments of the module's forward that are None unless given.

    Others that have a default choose a way through the forward, of which a trace would show only one.
    """
    parameters = inspect.signature(type(module).forward).parameters.values()
    for parameter in parameters:
        if isinstance(parameter.default, bool | int | str):
            raise ValueError(f"its argument {parameter.name}={parameter.default!r} may choose what it does")
    return {parameter.name: None for parameter in parameters if parameter.default is None}


def _label(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.__dict__.get("jacobian_record") is not None or attached_interception(module) is not None:
            raise ValueError(
                f"model: a DREG is attached to its layer {name!r}; call its remove(), or DREG.detach(model), and "
                "attach a new one afterwards"
            )

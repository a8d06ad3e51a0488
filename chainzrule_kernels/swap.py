r"""A linear layer and the activation behind it as one module, put in the place of both, and taken out again.

The fused module stands where the linear layer stood, with its parameters under their names; where the activation stood
there is an identity, with the activation's parameters under their names. So the keys of the ``state_dict`` stay, the
parameters are the same objects, and an optimizer that holds them goes on.

What it is good for: without gradients the activation works in the memory of the matrix product, so that an evaluation
keeps one tensor less; and :class:`chainzrule_kernels.DREG` finds a layer that computes its Jacobian norm itself. In
training without DREG a swapped model does what the plain one does, with the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chainzrule_kernels.diagnostics import Table
from chainzrule_kernels.nn import Polynomial
from chainzrule_kernels.nn.jacobian_record import JacobianRecord, refuse_replica
from chainzrule_kernels.ops.linear_activation_dreg.op import linear_activation_dreg
from chainzrule_kernels.ops.linear_polynomial_dreg.op import linear_polynomial_dreg
from chainzrule_kernels.ops.polynomial.op import polynomial

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
        model: any module. A pair is a :class:`torch.nn.Linear` and, next to it in a :class:`torch.nn.Sequential`, a
            ``ReLU``, ``GELU``, ``SiLU``, ``Tanh``, ``Sigmoid``, ``Softplus``, ``Mish`` or
            :class:`chainzrule_kernels.nn.Polynomial`, with nothing but identities between them.

    Returns:
        One row for each linear layer and each such activation, with the reason where nothing was replaced; print the
        table to read it.

    Raises:
        TypeError: when ``model`` is not a module.
        ValueError: when a regulariser is attached to it: swap first, regularise then.

    Outputs, gradients, parameters, ``state_dict`` and the training mode stay what they are. Modules with hooks are left
    alone, since a hook would see other values, and so are subclasses of ``Linear``. A model that calls a part of one of
    its ``Sequential``, such as ``self.net[0]``, is not for swapping: that part's output becomes the activation's. Swap
    before ``torch.compile``, DistributedDataParallel and ``fully_shard``. :func:`unswap` takes it back.
    """
    _check(model)
    rows: list[SwapRow] = []
    seen: set[int] = set()
    for pair in list(_candidates(model)):
        seen.update(id(module) for module in (pair.linear, pair.activation) if module is not None)
        note = pair.note or _why_not(pair)
        if not note:
            _replace(pair)
        rows.append(SwapRow(pair.linear_name, pair.activation_name, pair.function, not note, note))
    for name, module in model.named_modules():
        if id(module) not in seen and isinstance(module, (nn.Linear, *_ACTIVATIONS)):
            is_linear = isinstance(module, nn.Linear)
            note = "in no torch.nn.Sequential"
            function = None if is_linear else _function_of(module)
            rows.append(SwapRow(name if is_linear else None, None if is_linear else name, function, False, note))
    order = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return Table(sorted(rows, key=lambda row: order[row.linear or row.activation or ""]))


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
    jacobian_record: JacobianRecord | None = None  # set on the instance by DREG

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
    def coeffs(self) -> Tensor | None:
        """The coefficients of the polynomial; None for a fixed activation."""
        coeffs: Tensor | None = self._originals[1]._parameters.get("coeffs")
        return coeffs

    def forward(self, x: Tensor) -> Tensor:
        """``f(x Wᵀ + b)``."""
        weight, bias, coeffs, record = self.weight, self.bias, self.coeffs, self.jacobian_record
        if record is not None:
            refuse_replica(self)
            if coeffs is None:
                y, jac_sq = linear_activation_dreg(x, weight, bias, self.function)
            else:
                y, jac_sq = linear_polynomial_dreg(x, weight, bias, coeffs)
            record.add(jac_sq, self.out_features)
            return y
        z = F.linear(x, weight, bias)
        if coeffs is not None:
            return polynomial(z, coeffs)
        # Nobody else has seen z. Under autocast the activation may have another dtype than z.
        overwrite = not z.requires_grad and not torch.is_autocast_enabled(z.device.type)
        function, function_in_place = _FUNCTIONS[self.function]
        return function_in_place(z) if overwrite else function(z)

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

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish, Polynomial)

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


@dataclass(frozen=True)
class _Pair:
    """A linear layer and what follows it; either may be missing, and the note then says so."""

    owner: nn.Module
    linear_slot: str
    activation_slot: str
    linear: nn.Linear | None
    activation: nn.Module | None
    linear_name: str | None
    activation_name: str | None
    function: str | None
    note: str = ""


def _candidates(model: nn.Module) -> Iterator[_Pair]:
    """Every linear layer and every activation in a Sequential, in pairs where they follow each other."""
    for owner_name, owner in model.named_modules():
        if not isinstance(owner, nn.Sequential):
            continue
        prefix = f"{owner_name}." if owner_name else ""
        children = [(slot, child) for slot, child in owner._modules.items() if not _is_identity(child)]
        following = [*children[1:], ("", None)]
        taken = None
        for (slot, child), (next_slot, next_child) in zip(children, following, strict=True):
            if isinstance(child, nn.Linear):
                function = None if next_child is None else _function_of(next_child)
                if function is not None:
                    names = prefix + slot, prefix + next_slot
                    yield _Pair(owner, slot, next_slot, child, next_child, *names, function)
                    taken = next_slot
                else:
                    what = "nothing" if next_child is None else f"a {type(next_child).__name__}"
                    note = f"{what} behind it, not one of the activations {', '.join((*_FUNCTIONS, 'polynomial'))}"
                    yield _Pair(owner, slot, "", child, None, prefix + slot, None, None, note)
            elif isinstance(child, _ACTIVATIONS) and slot != taken:
                note = "no torch.nn.Linear in front of it"
                yield _Pair(owner, "", slot, None, child, None, prefix + slot, _function_of(child), note)


def _function_of(activation: nn.Module) -> str | None:
    """The kind of an activation, ``"polynomial"``, or None for anything else."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if type(activation) is nn.Softplus:
        return "softplus" if (activation.beta, activation.threshold) == (1, 20) else None
    others = {
        nn.ReLU: "relu",
        nn.SiLU: "silu",
        nn.Tanh: "tanh",
        nn.Sigmoid: "sigmoid",
        nn.Mish: "mish",
        Polynomial: "polynomial",
    }
    return others.get(type(activation))


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or (type(module) is nn.Identity and not _has_hooks(module))


def _why_not(pair: _Pair) -> str:
    """Why a pair is to be left alone; empty if it is not."""
    if type(pair.owner).forward is not nn.Sequential.forward or "forward" in pair.owner.__dict__:
        return f"{type(pair.owner).__name__}, in which they stand, has a forward of its own"
    for name, module in ((pair.linear_name, pair.linear), (pair.activation_name, pair.activation)):
        if module is not None:
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                return f"{name} is a {type(module).__name__}, a class of its own"
            if "forward" in module.__dict__:
                return f"{name} has a forward put on it"
            if _has_hooks(module):
                return f"{name} has hooks, which would see other values"
    return ""


def _has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


def _replace(pair: _Pair) -> None:
    if pair.linear is None or pair.activation is None or pair.function is None:
        raise AssertionError("a pair without a note has both parts")
    pair.owner._modules[pair.linear_slot] = SwappedLinear(pair.linear, pair.activation, pair.function)
    pair.owner._modules[pair.activation_slot] = AbsorbedActivation(pair.activation)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.__dict__.get("jacobian_record") is not None:
            raise ValueError(
                f"model: a DREG is attached to its layer {name!r}; call its remove(), or DREG.detach(model), and "
                "attach a new one afterwards"
            )

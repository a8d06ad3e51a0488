r"""Turning a model into a PolyKervNet, and back (SPEC 2.4; SaTML 2023, arXiv 2312.15229).

The authors replace either the convolutions or the activations, not both:

* convolutions (``"rpkn"``, ``"pkn"``, ``"kerv"``): kernel convolution → batch norm → nothing where ReLU was,
* activations (``"react"``, ``"act"``): convolution → batch norm → polynomial where ReLU was,

and max-pooling becomes average pooling in both. What takes the place of a module remembers it, so that
:func:`from_polykervnet` can put it back.
"""

from __future__ import annotations

import copy
import dis
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chainzrule_kernels.coefficients import check_flag
from chainzrule_kernels.diagnostics import Table
from chainzrule_kernels.nn.activations import ActPKN, PolynomialActivation, ReactPKN
from chainzrule_kernels.nn.polynomial_convolution import KervConv2d, PKNConv2d, PolynomialConvolution, RPKNConv2d

__all__ = ["PolyKervNetRow", "from_polykervnet", "polykervnet_report", "to_polykervnet"]

CONVOLUTION_KERNELS: dict[str, type[PolynomialConvolution]] = {
    "rpkn": RPKNConv2d,
    "pkn": PKNConv2d,
    "kerv": KervConv2d,
}
ACTIVATION_KERNELS: dict[str, type[PolynomialActivation]] = {"react": ReactPKN, "act": ActPKN}

_MAX_POOLS = {nn.MaxPool1d: nn.AvgPool1d, nn.MaxPool2d: nn.AvgPool2d, nn.MaxPool3d: nn.AvgPool3d}
_ADAPTIVE_MAX_POOLS = {
    nn.AdaptiveMaxPool1d: nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool2d: nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool3d: nn.AdaptiveAvgPool3d,
}
_KNOWN_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
# Functions that do in a forward what a module would have been replaced for.
_FUNCTIONS = ("relu", "relu_", "max_pool1d", "max_pool2d", "max_pool3d")
_FUNCTION_NAMES = {
    id(getattr(place, name)): name for place in (torch, F) for name in _FUNCTIONS if hasattr(place, name)
}

# Where the replaced module is kept; in the __dict__ of its successor, since it is not to be a part of the model.
_ORIGINAL = "_polykervnet_original"
_REPORT = "_polykervnet_report"

Choice = Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class PolyKervNetRow:
    """One row of :func:`polykervnet_report`.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        module: its class before.
        became: its class now; None where it was left alone.
        note: why it was left alone, or what changes with it.
    """

    name: str
    module: str
    became: str | None
    note: str


def to_polykervnet(
    model: nn.Module,
    kernel: str = "rpkn",
    *,
    layers: Choice | None = None,
    keep_first: bool = False,
    activations: tuple[type[nn.Module], ...] = (nn.ReLU,),
    pool: bool = True,
    inplace: bool = False,
    **polynomial: Any,
) -> nn.Module:
    r"""A model with polynomial kernels for its convolutions, or with polynomials for its activations.

    .. code-block:: python

        net = ck.to_polykervnet(resnet, "rpkn")
        print(ck.polykervnet_report(net))

    Weights, biases and their ``state_dict`` keys stay; the parameters of the polynomials come in addition. Convert
    before making the optimizer, which has to know those, and before ``torch.compile``.

    Args:
        model: any module, one that was converted in parts before as well. Convolutions and activations that are modules
            of their own are found; a forward that calls ``F.relu`` cannot be changed, and the report names it.
        kernel: ``"rpkn"``, ``"pkn"`` or ``"kerv"`` for a kernel convolution, ``"react"`` or ``"act"`` for a polynomial
            activation.
        layers: which to replace of the convolutions (of the activations for ``"react"`` and ``"act"``): names as in
            ``model.named_modules()``, or a function of name and module. None for all, as published.
        keep_first: whether the first of those stays as it is.
        activations: the classes of activation that are removed or replaced. A kernel convolution takes over that of the
            layer: one that stands behind a linear layer, or behind a convolution that stays, stays too.
        pool: whether max-pooling becomes average pooling, as published.
        inplace: whether ``model`` itself is changed; otherwise a deep copy is. A model that is replaced as a whole,
            because it is one convolution, is returned anew in either case.
        **polynomial: arguments of the new modules, such as ``degree``, ``a``, ``c`` or ``learnable``; by default what
            was published.

    Returns:
        The model. Its new modules are in training or evaluation mode as the old ones were.

    Raises:
        TypeError, ValueError: for arguments out of range, for a name that is not in the model, or when nothing in the
            model can be replaced. The model has not been changed then.
    """
    _check_arguments(model, kernel, keep_first, activations, pool, inplace)
    if not inplace:
        model = copy.deepcopy(model)
    conversion = _Conversion(model, kernel, layers, keep_first, activations, pool, polynomial)
    for original, successor in conversion.successors.items():
        successor.__dict__[_ORIGINAL] = original
    model = _replace(model, conversion.successors)
    model.__dict__[_REPORT] = Table(conversion.rows)
    return model


def from_polykervnet(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with what :func:`to_polykervnet` replaced put back.

    Weights and biases are those of now: a model that has been trained as a PolyKervNet keeps what it learned, except
    the parameters of the polynomials, which have no place in it.

    Args:
        model: one that :func:`to_polykervnet` returned, once or several times, or a copy of it.
        inplace: whether ``model`` itself is changed; otherwise a deep copy is.

    Raises:
        TypeError: when ``model`` is not a module.
        ValueError: when nothing in it was replaced.
    """
    _check_module(model)
    check_flag("inplace", inplace)
    if not inplace:
        model = copy.deepcopy(model)
    originals: dict[nn.Module, nn.Module] = {}
    place = _floating_parameter(model)
    for module in model.modules():
        original = module.__dict__.get(_ORIGINAL)
        if original is not None:
            earlier = original.__dict__.get(_ORIGINAL)
            while earlier is not None:  # replaced more than once
                original, earlier = earlier, earlier.__dict__.get(_ORIGINAL)
            if isinstance(module, PolynomialConvolution):
                original.weight, original.bias = module.weight, module.bias
            elif place is not None:
                original.to(place.device, place.dtype)  # not a part of the model when that was moved
            originals[module] = original.train(module.training)
    if not originals:
        raise ValueError(f"model: expected one that to_polykervnet has converted, got a {type(model).__name__}")
    model.__dict__.pop(_REPORT, None)
    for module in originals:
        del module.__dict__[_ORIGINAL]
    return _replace(model, originals)


def polykervnet_report(model: nn.Module) -> Table[PolyKervNetRow]:
    """What :func:`to_polykervnet` changed in ``model`` and what it left alone, and why; print it to read it.

    Raises:
        TypeError: when ``model`` is not a module.
        ValueError: when it was not converted.
    """
    _check_module(model)
    report = model.__dict__.get(_REPORT)
    if report is None:
        raise ValueError(f"model: expected one that to_polykervnet has converted, got a {type(model).__name__}")
    return report


class _Conversion:
    """What is to be replaced in a model by what, and the report on it. Changes nothing."""

    def __init__(
        self,
        model: nn.Module,
        kernel: str,
        layers: Choice | None,
        keep_first: bool,
        activations: tuple[type[nn.Module], ...],
        pool: bool,
        polynomial: dict[str, Any],
    ) -> None:
        self.rows: list[PolyKervNetRow] = []
        self.successors: dict[nn.Module, nn.Module] = {}
        self._model = model
        self._activations = activations
        self._wanted = _selection(model, layers)
        self._is_first = keep_first
        if kernel in CONVOLUTION_KERNELS:
            self._convolutions(CONVOLUTION_KERNELS[kernel], polynomial)
            self._removed_activations()
        else:
            self._replaced_activations(ACTIVATION_KERNELS[kernel], polynomial)
        if not self.successors:
            reasons = f":\n{Table(self.rows)}" if self.rows else ""
            what = "convolution" if kernel in CONVOLUTION_KERNELS else "activation"
            raise ValueError(f"model: found no {what} to replace in a {type(model).__name__}{reasons}")
        if pool:
            self._pools()
        self._functions()
        self._earlier_rows()
        order = {name: position for position, (name, _) in enumerate(model.named_modules())}
        self.rows.sort(key=lambda row: order[row.name])

    def _earlier_rows(self) -> None:
        """What an earlier conversion replaced and this one leaves as it is."""
        named = {row.name for row in self.rows}
        earlier = self._model.__dict__.get(_REPORT, ())
        self.rows += [row for row in earlier if row.became is not None and row.name not in named]

    def _note(self, name: str, module: nn.Module, successor: nn.Module | None, note: str = "") -> None:
        became = None if successor is None else type(successor).__name__
        if successor is not None and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
            note = "its hooks are not taken over"
        self.rows.append(PolyKervNetRow(name, type(module).__name__, became, note))
        if successor is not None:
            self.successors[module] = successor.train(module.training)

    def _why_not(self, name: str, module: nn.Module) -> str | None:
        """Why the user does not want this one replaced."""
        if self._is_first:
            self._is_first = False
            return "the first one, which keep_first keeps"
        return None if self._wanted(name, module) else "not chosen by layers"

    def _convolutions(self, kernel: type[PolynomialConvolution], polynomial: dict[str, Any]) -> None:
        for name, module in self._model.named_modules():
            if not isinstance(module, nn.modules.conv._ConvNd) or isinstance(module, PolynomialConvolution):
                continue
            reason = kernel.why_not_from(module) or self._why_not(name, module)
            self._note(name, module, None if reason else kernel.from_conv(module, **polynomial), reason or "")

    def _replaced_activations(self, activation: type[PolynomialActivation], polynomial: dict[str, Any]) -> None:
        like = _floating_parameter(self._model)
        place = {} if like is None else {"device": like.device, "dtype": like.dtype}
        for name, module in self._model.named_modules():
            if isinstance(module, _KNOWN_ACTIVATIONS) or type(module) in self._activations:
                reason = self._not_an_activation(module) or self._why_not(name, module)
                self._note(name, module, None if reason else activation(**place, **polynomial), reason or "")

    def _not_an_activation(self, module: nn.Module) -> str | None:
        return None if type(module) in self._activations else f"{type(module).__name__} is not among the activations"

    def _removed_activations(self) -> None:
        seen: set[nn.Module] = set()
        for owner_name, owner in self._model.named_modules():
            children = [(name, child) for name, child in owner._modules.items() if child is not None]
            for position, (child_name, child) in enumerate(children):
                if child in seen or not (isinstance(child, _KNOWN_ACTIVATIONS) or type(child) in self._activations):
                    continue
                seen.add(child)
                name = f"{owner_name}.{child_name}" if owner_name else child_name
                beside = [module for _, module in children]
                if not any(True for module in beside for _ in _layers(module)):
                    beside, position = self._further_out(owner_name)
                reason = self._not_an_activation(child) or self._activation_stays(beside, position)
                self._note(name, child, None if reason else nn.Identity(), reason or "")

    def _further_out(self, name: str) -> tuple[list[nn.Module], int]:
        """What stands beside the smallest container around a module that has layers beside it, and where it stands."""
        while name:
            outer, _, inner = name.rpartition(".")
            children = self._model.get_submodule(outer)._modules
            names = [child_name for child_name, child in children.items() if child is not None]
            beside = [child for child in children.values() if child is not None]
            if any(True for module in beside for _ in _layers(module)):
                return beside, names.index(inner)
            name = outer
        return [], 0

    def _activation_stays(self, beside: list[nn.Module], position: int) -> str | None:
        """Why an activation is still needed: the layer that it belongs to, the nearest one, has no kernel."""
        in_front = [layer for module in beside[:position] for layer in _layers(module)]
        behind = [layer for module in beside[position:] for layer in _layers(module)]
        nearest = in_front[-1] if in_front else next(iter(behind), None)
        if nearest is None:
            return "no convolution beside it"
        if nearest in self.successors:
            return None
        where = "in front of it" if in_front else "behind it"
        return f"the layer {where} is a {type(nearest).__name__} that stays"

    def _pools(self) -> None:
        for name, module in self._model.named_modules():
            average: Any = _MAX_POOLS.get(type(module)) or _ADAPTIVE_MAX_POOLS.get(type(module))
            if average is not None:
                reason = _why_no_average(module)
                self._note(name, module, None if reason else average(*_pool_arguments(module)), reason or "")

    def _functions(self) -> None:
        for name, module in self._model.named_modules():
            if not type(module).__module__.startswith(("torch.nn.modules", "chainzrule_kernels.nn")):
                for function in _called_functions(module):
                    note = f"its forward calls {function}, which cannot be replaced"
                    self.rows.append(PolyKervNetRow(name, type(module).__name__, None, note))
                for attribute, function in _kept_functions(module):
                    note = f"its attribute {attribute} is the function {function}, which cannot be replaced"
                    self.rows.append(PolyKervNetRow(name, type(module).__name__, None, note))


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers with weights in a module, itself included, in the order in which they were made."""
    return (part for part in module.modules() if isinstance(part, _WEIGHTED))


def _why_no_average(pool: Any) -> str | None:
    """Why a max-pooling has no average of the same shape."""
    dilation = getattr(pool, "dilation", 1)
    if any(value != 1 for value in (dilation if isinstance(dilation, tuple) else (dilation,))):
        return "average pooling has no dilation"
    return "average pooling returns no indices" if pool.return_indices else None


def _pool_arguments(pool: Any) -> tuple[Any, ...]:
    """Those with which the average pooling is made."""
    if type(pool) in _ADAPTIVE_MAX_POOLS:
        return (pool.output_size,)
    return pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode


def _floating_parameter(model: nn.Module) -> nn.Parameter | None:
    """One that shows on which device and in which dtype the model is."""
    return next((value for value in model.parameters() if value.is_floating_point()), None)


def _kept_functions(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Which of :data:`_FUNCTIONS` a module keeps in an attribute, each with the attribute's name."""
    for attribute, value in vars(module).items():
        if id(value) in _FUNCTION_NAMES:
            yield attribute, _FUNCTION_NAMES[id(value)]


def _called_functions(module: nn.Module) -> list[str]:
    """Which of :data:`_FUNCTIONS` the forward of a module calls, as a function or as a method of a tensor.

    Read from the names in its code. ``self.relu(x)`` calls a module and does not count.
    """
    code = getattr(getattr(module.forward, "__func__", None), "__code__", None)
    if code is None:
        return []
    found = []
    before: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.argval in _FUNCTIONS and instruction.opname.startswith(
            ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL")
        ):
            is_own = before is not None and code.co_varnames[:1] == (_last(before.argval),)
            if not is_own and instruction.argval not in found:
                found.append(instruction.argval)
        if instruction.opname != "CACHE":
            before = instruction
    return found


def _last(value: Any) -> Any:
    """The name that an instruction has loaded last; since Python 3.13 one instruction may load two."""
    return value[-1] if isinstance(value, tuple) and value else value


def _replace(model: nn.Module, successors: dict[nn.Module, nn.Module]) -> nn.Module:
    """The model with every occurrence of a module replaced by its successor."""
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child in successors:
                owner._modules[name] = successors[child]
    return successors.get(model, model)


def _selection(model: nn.Module, layers: Choice | None) -> Callable[[str, nn.Module], bool]:
    if layers is None:
        return lambda name, module: True
    if callable(layers):
        return layers
    if isinstance(layers, str):
        raise TypeError(f"layers: expected names or a function of name and module, got the string {layers!r}")
    try:
        names = set(layers)
    except TypeError as error:
        raise TypeError(f"layers: expected names or a function, got {type(layers).__name__}") from error
    known = {name for name, _ in model.named_modules()}
    if unknown := sorted(map(repr, names - known)):
        raise ValueError(f"layers: the model has no module named {', '.join(unknown)}")
    return lambda name, module: name in names


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _check_arguments(model: Any, kernel: Any, keep_first: Any, activations: Any, pool: Any, inplace: Any) -> None:
    _check_module(model)
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model: expected one that torch.compile has not wrapped; convert it first and compile the result"
        )
    known = (*CONVOLUTION_KERNELS, *ACTIVATION_KERNELS)
    if kernel not in known:
        raise ValueError(f"kernel: expected one of {', '.join(known)}, got {kernel!r}")
    for name, value in (("keep_first", keep_first), ("pool", pool), ("inplace", inplace)):
        check_flag(name, value)
    if not isinstance(activations, tuple) or not all(
        isinstance(value, type) and issubclass(value, nn.Module) for value in activations
    ):
        raise TypeError(f"activations: expected a tuple of classes of modules, got {activations!r}")

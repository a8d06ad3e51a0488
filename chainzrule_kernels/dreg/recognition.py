"""What a module or a function is to DREG: a linear map, an activation, a norm, or something that changes nothing.

A module of PyTorch is known by its ``forward``, so that a subclass with a forward of its own is not taken for what it
inherits from. An activation of another library is known by what it computes: it is called on a few numbers, and they
are compared with those of the package's activations.
"""

from __future__ import annotations

import contextlib
import operator
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from chainzrule_kernels.functions import ACTIVATION_KINDS
from chainzrule_kernels.functions.activations import Activation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_OTHER_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.SyncBatchNorm,
)
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_BATCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    # Which become those with the first batch.
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
)

# Functions that return their first argument's values, in another place, dtype or with some of them dropped.
TRANSPARENT_FUNCTIONS: frozenset[Any] = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        torch.dropout,
        Tensor.contiguous,
        Tensor.to,
        Tensor.float,
        Tensor.double,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.type,
        Tensor.type_as,
        Tensor.clone,
        torch.clone,
    }
)
# Functions that return parts of a tensor, along one dimension.
PART_FUNCTIONS: frozenset[Any] = frozenset(
    {torch.chunk, Tensor.chunk, torch.split, Tensor.split, Tensor.__getitem__, operator.getitem}
)
OTHER_NORM_FUNCTIONS: frozenset[Any] = frozenset({F.layer_norm, F.group_norm, F.rms_norm, F.instance_norm})
_SIMPLE_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    Tensor.relu: "relu",
    Tensor.relu_: "relu",
    F.silu: "silu",
    F.mish: "mish",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
    F.tanh: "tanh",
    Tensor.tanh: "tanh",
    Tensor.tanh_: "tanh",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    Tensor.sigmoid_: "sigmoid",
}
_IN_PLACE = frozenset({F.relu_, torch.relu_, Tensor.relu_, torch.tanh_, Tensor.tanh_, torch.sigmoid_, Tensor.sigmoid_})
PRODUCTS: frozenset[Any] = frozenset({operator.mul, operator.imul, torch.mul, Tensor.mul, Tensor.mul_})
# Functions of two tensors that work on each element: the sum of feature maps is a feature map.
ELEMENTWISE_FUNCTIONS: frozenset[Any] = frozenset(
    {
        operator.add,
        operator.iadd,
        operator.sub,
        operator.isub,
        torch.add,
        torch.sub,
        Tensor.add,
        Tensor.add_,
        Tensor.sub,
        Tensor.sub_,
        *PRODUCTS,
    }
)
# By the name under which the tables speak of each.
ACTIVATION_FUNCTIONS: dict[Any, str] = {
    function: function.__name__.rstrip("_") for function in (*_SIMPLE_ACTIVATIONS, F.gelu, F.softplus)
}
# Outside of a compiled function their calls reach torch function modes: as F.tanh calls z.tanh(), and by themselves.
FUNCTIONS_HIDDEN_BY_DYNAMO: frozenset[Any] = frozenset({F.tanh, F.sigmoid, torch.relu_, torch.tanh_, torch.sigmoid_})
# Named in the table of what is not regularised, so that nobody takes them for regularised.
_OTHER_ACTIVATIONS: dict[Any, str] = {
    getattr(where, name): name.rstrip("_")
    for where in (F, torch, Tensor)
    for name in (
        "celu",
        "celu_",
        "elu",
        "elu_",
        "glu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "hardtanh_",
        "leaky_relu",
        "leaky_relu_",
        "logsigmoid",
        "prelu",
        "relu6",
        "rrelu",
        "rrelu_",
        "selu",
        "selu_",
        "softshrink",
        "softsign",
        "tanhshrink",
        "threshold",
        "threshold_",
    )
    if hasattr(where, name)
}
# These may be anything; right behind a linear map they are named as well. clamp(min=0) is relu by hand.
POSSIBLE_ACTIVATIONS: frozenset[Any] = frozenset(
    {
        torch.special.expit,
        *(
            getattr(where, name)
            for where in (torch, Tensor)
            for name in ("arctan", "atan", "clamp", "clamp_", "clamp_min", "clip", "cos", "erf", "exp", "sin", "sin_")
            if hasattr(where, name)
        ),
    }
)
_OTHER_ACTIVATION_MODULES = (
    nn.CELU,
    nn.ELU,
    nn.GLU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.PReLU,
    nn.RReLU,
    nn.SELU,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Threshold,
)
NOT_OURS = f"not one of the activations {', '.join(ACTIVATION_KINDS)}"


class ActivationCall:
    """What a call of an activation computes.

    Attributes:
        name: of the function, for the tables.
        kind: one of :data:`~chainzrule_kernels.ACTIVATION_KINDS`, or None.
        reason: why there is no kind.
        in_place: whether it overwrites its argument.
    """

    def __init__(self, name: str, kind: str | None, reason: str = "", in_place: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.reason = reason
        self.in_place = in_place


def gelu_kind(approximate: Any) -> str | None:
    """The kind of ``F.gelu(z, approximate=…)``."""
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def is_plain_softplus(beta: float, threshold: float) -> bool:
    """Whether ``F.softplus`` with these arguments is ``log(1 + exp(z))`` to rounding."""
    return beta == 1 and threshold >= 20


def kind_of_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The kind of activation that ``function(*args, **kwargs)`` is, or None. ``args[0]`` is its input."""
    kind = _SIMPLE_ACTIVATIONS.get(function)
    if kind is not None:
        return kind
    if function is F.gelu:
        return gelu_kind(args[1] if len(args) > 1 else kwargs.get("approximate", "none"))
    if function is F.softplus:
        beta = args[1] if len(args) > 1 else kwargs.get("beta", 1)
        threshold = args[2] if len(args) > 2 else kwargs.get("threshold", 20)
        return "softplus" if is_plain_softplus(beta, threshold) else None
    return None


def describe_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ActivationCall | None:
    """The activation that a call is, one that is not ours included; None when it is no activation."""
    in_place = function in _IN_PLACE or kwargs.get("inplace") is True or (function is F.relu and args[1:2] == (True,))
    if function in ACTIVATION_FUNCTIONS:
        kind = kind_of_call(function, args, kwargs)
        name = ACTIVATION_FUNCTIONS[function]
        reason = "" if kind else f"{name} with these arguments is {NOT_OURS}"
        return ActivationCall(name, kind, reason, in_place or (function in (F.silu, F.mish) and args[1:2] == (True,)))
    if function in _OTHER_ACTIVATIONS:
        name = _OTHER_ACTIVATIONS[function]
        return ActivationCall(name, None, NOT_OURS, in_place)
    return None


def dimension_of_parts(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Along which dimension a call of :data:`PART_FUNCTIONS` takes parts of a tensor; None where it does other things.

    A slice is one along ``d`` when it is ``x[:, …, a:b]`` with ``d`` colons in front, or ``x[..., a:b]`` for the last.
    """
    if function in (Tensor.__getitem__, operator.getitem):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not index or not isinstance(index[-1], slice):
            return None
        before = index[:-1]
        # An array would be compared element by element.
        if len(before) == 1 and before[0] is ...:
            return -1
        return len(before) if all(isinstance(one, slice) and one == slice(None) for one in before) else None
    dimension = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    return dimension if isinstance(dimension, int) else None


def has_own_forward(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether the module computes something else than ``known``, of which it is an instance."""
    return type(module).forward is not known.forward or "forward" in module.__dict__


def activation_of(module: nn.Module) -> ActivationCall | None:
    """The activation that a module is, one that is not ours included; None when it is no activation."""
    name = type(module).__name__
    in_place = getattr(module, "inplace", False) is True
    kind = _kind_of_plain_module(module)
    if kind is not None:
        return ActivationCall(name, kind, in_place=in_place)
    if isinstance(module, _OTHER_ACTIVATION_MODULES):
        return ActivationCall(name, None, NOT_OURS, in_place)
    if isinstance(module, nn.GELU | nn.Softplus) and not has_own_forward(module, type(module).__mro__[0]):
        return ActivationCall(name, None, f"{module} is {NOT_OURS}")
    if type(module).__module__.startswith("torch.nn."):
        return None
    found = _kind_by_values(module)
    if found is None:
        return None
    kind, in_place = found
    return ActivationCall(name, kind, "" if kind else NOT_OURS, in_place)


def _kind_of_plain_module(module: nn.Module) -> str | None:
    plain: tuple[tuple[type[nn.Module], str], ...] = (
        (nn.ReLU, "relu"),
        (nn.SiLU, "silu"),
        (nn.Tanh, "tanh"),
        (nn.Sigmoid, "sigmoid"),
        (nn.Mish, "mish"),
    )
    for known, kind in plain:
        if isinstance(module, known) and not has_own_forward(module, known):
            return kind
    if isinstance(module, nn.GELU) and not has_own_forward(module, nn.GELU):
        return gelu_kind(module.approximate)
    if isinstance(module, nn.Softplus) and not has_own_forward(module, nn.Softplus):
        return "softplus" if is_plain_softplus(module.beta, module.threshold) else None
    return None


def _kind_by_values(module: nn.Module) -> tuple[str | None, bool] | None:
    """The kind that agrees with a module without parameters on a few numbers, and whether it overwrites them.

    The same in training and in evaluation. The kind is None for a function of each number that is not one of ours. All
    is None for anything else, and for a module that does more than compute, such as one that keeps its output: what
    stands in its place would not do that. A module with a number or two to learn may be such a function, and never one
    of ours, which it would not stay.
    """
    learnt = [*module.parameters(), *module.buffers()]
    if "forward" in module.__dict__ or any(map(is_lazy, learnt)):
        return None
    if any(value.numel() != 1 for value in learnt):
        return None
    found = {_kind_of_values(module, training) for training in (module.training, not module.training)}
    only = found.pop() if len(found) == 1 else None
    return None if learnt and only is not None and only[0] is not None else only


def _kind_of_values(module: nn.Module, training: bool) -> tuple[str | None, bool] | None:
    # Far out, too, where some activations are clipped; exp() of these is still finite.
    near, far = torch.linspace(-6, 6, 49), torch.tensor([30.0, 100.0, 600.0])
    numbers = torch.cat([near, -far, far]).double()
    parts = [(part, part.training) for part in module.modules()]
    try:
        with unchanged(module), torch.no_grad(), torch.device("cpu"):
            for part, _ in parts:
                part.training = training
            before = attributes_of(module)
            # On a copy: it may be an activation in place. Two dimensions more, for those that look at the shape.
            given = numbers.clone().view(1, 1, -1)
            values = module.forward(given)
            if attributes_of(module) != before:
                return None
            some = module.forward(near.double().flip(0)[::2].clone().view(1, 1, -1))
    except Exception:  # whatever it is, it is no activation
        return None
    finally:
        for part, was_training in parts:
            part.training = was_training
    if not isinstance(values, Tensor) or values.shape != (1, 1, numbers.numel()) or values.is_meta:
        return None
    for kind in ACTIVATION_KINDS:
        (expected,) = Activation(kind).derivatives(numbers, 0)
        # Wide enough for a constant written with ten digits or a cast to float32; the kinds differ by more.
        if torch.allclose(values.flatten().double(), expected, rtol=1e-6, atol=1e-6):
            return kind, not torch.equal(given.flatten(), numbers)
    values = values.flatten()
    expected = values[: near.numel()].flip(0)[::2]
    if some.numel() != expected.numel() or not torch.allclose(some.flatten(), expected, rtol=1e-6, atol=1e-9):
        return None
    return None if _is_combination_of_ours(numbers, values) else (None, False)


def _is_combination_of_ours(numbers: Tensor, values: Tensor) -> bool:
    """Whether ``values`` are ``a f(numbers) + b`` with one of our activations, or the identity, for ``f``."""
    for f in (numbers, *(Activation(kind).derivatives(numbers, 0)[0] for kind in ACTIVATION_KINDS)):
        basis = torch.stack([f, torch.ones_like(f)], dim=1)
        fitted = basis @ torch.linalg.lstsq(basis, values.double()[:, None]).solution
        if torch.allclose(fitted.flatten(), values.double(), rtol=1e-6, atol=1e-6):
            return True
    return False


def attributes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Which objects the attributes of a module are, and which are in those that are containers."""
    return {
        name: (id(value), *(map(id, value.values() if isinstance(value, dict) else value)))
        if isinstance(value, list | dict | set)
        else (id(value),)
        for name, value in module.__dict__.items()
    }


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Undo what code run inside does to the attributes of a module and to the random number generators of the CPU.

    A forward that is traced or tried out may count its calls or keep its outputs.
    """
    attributes = dict(module.__dict__)
    contents = {name: value.copy() for name, value in attributes.items() if isinstance(value, list | dict | set)}
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for name, value in contents.items():
            container = attributes[name]
            container.clear()
            container.extend(value) if isinstance(container, list) else container.update(value)


# ---- linear maps ----------------------------------------------------------------------------------------------------


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether the module is the ``Conv1D`` of the transformers library: a linear layer with a transposed weight."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def why_no_linear_map(module: nn.Module) -> str | None:
    """None for a module that is a linear map whose rows are known; otherwise why it is not one."""
    own_forward = f"a {type(module).__name__}, has a forward of its own"
    if isinstance(module, nn.Linear):
        return own_forward if has_own_forward(module, nn.Linear) else None
    for known in CONVOLUTIONS:
        if isinstance(module, known):
            if has_own_forward(module, known):
                return own_forward
            if module.padding_mode != "zeros":
                return f"a {type(module).__name__}, pads by {module.padding_mode!r} instead of zeros"
            return None
    if is_transformers_conv1d(module):
        return own_forward if "forward" in module.__dict__ else None
    return f"a {type(module).__name__}, is not a linear layer or a convolution"


def is_linear_map(module: nn.Module) -> bool:
    """Whether the module is a linear map whose rows are known."""
    return why_no_linear_map(module) is None


# ---- what stands between --------------------------------------------------------------------------------------------


def spatial_of(module: nn.Module, otherwise: int | None = None) -> int | None:
    """How many spatial dimensions a module's output has by its class (``Conv2d``, ``BatchNorm2d``, ``AvgPool2d``: 2).

    ``otherwise`` where the class leaves it open, as that of a batch norm of one dimension does.
    """
    if isinstance(module, (*CONVOLUTIONS, *_BATCH_NORMS)) or type(module).__module__ == "torch.nn.modules.pooling":
        names = (cls.__name__ for cls in type(module).__mro__)
        dimensions = next((name[-2] for name in names if name.endswith(("1d", "2d", "3d"))), None)
        open_to_rows = isinstance(module, nn.BatchNorm1d | nn.LazyBatchNorm1d)
        return int(dimensions) if dimensions and not open_to_rows else otherwise
    return None


def is_transparent(module: nn.Module) -> bool:
    """Whether the module stands between a linear map and its activation without changing the layer's Jacobian norm."""
    if "forward" in module.__dict__:
        return False
    return isinstance(module, nn.Identity) or any(
        isinstance(module, known) and type(module).forward is known.forward for known in _DROPOUTS
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm of one process, which folds into the rows of the linear map."""
    return isinstance(module, _BATCH_NORMS) and not has_own_forward(module, _BatchNorm)


def is_other_norm(module: nn.Module) -> bool:
    """Whether the module is a norm that does not fold into the linear map."""
    if isinstance(module, _OTHER_NORMS):
        return True
    # By its name when it is written by hand, unless it has parts: a linear layer and its norm, for one.
    return type(module).__name__.endswith("Norm") and not isinstance(module, _BatchNorm) and not module._modules


def is_closed(module: nn.Module) -> bool:
    """Whether nothing inside the module is looked at: PyTorch's own modules, but for the containers."""
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, _CONTAINERS)

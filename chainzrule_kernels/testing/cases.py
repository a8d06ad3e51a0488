"""The table of cases: every op, with every form of its arguments. The one place where a new op is added.

A :class:`Case` knows how to draw arguments for a shape, dtype, arrangement and seed, how to call the op, and the plain
expression that a user of eager PyTorch would write in the data's own dtype, by which rounding errors are judged
(:mod:`~chainzrule_kernels.testing.accuracy`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chainzrule_kernels.functions import ACTIVATION_KINDS, MAX_DEGREE, Activation, ScalarFunction, polynomial_of
from chainzrule_kernels.ops import PUBLIC_OPS
from chainzrule_kernels.testing.layouts import LAYOUTS, Arrangement, Layout, contiguous

Arguments = dict[str, Any]
Shape = Sequence[int]


@dataclass(frozen=True)
class TensorArgument:
    """A differentiable tensor argument.

    Attributes:
        name: the argument's name in the public function.
        shape: its shape, given the shape for which a case is drawn: that of the data, for most ops.
        draw: ``(shape, generator)``: float64 values.
        is_data: whether it carries a batch, and so follows the dtype and arrangement of the data, or is a parameter.
    """

    name: str
    shape: Callable[[Shape], Shape]
    draw: Callable[[Shape, torch.Generator], Tensor]
    is_data: bool = False


@dataclass(frozen=True, eq=False)
class Case:
    """An op with one form of its arguments.

    Attributes:
        op: the public function.
        form: what distinguishes the case among those of its op.
        tensors: the differentiable arguments, the data first.
        constants: the other arguments, by name.
        outputs: the names of the results.
        plain: the same-dtype PyTorch expression: arguments to results.
        representative: whether a quick check should include the case.
    """

    op: str
    form: str
    tensors: tuple[TensorArgument, ...]
    constants: Mapping[str, Any]
    outputs: tuple[str, ...]
    plain: Callable[[Arguments], tuple[Tensor, ...]] = field(repr=False)
    representative: bool

    @property
    def name(self) -> str:
        """Unique in the table, fit for a test's name."""
        return f"{self.op}[{self.form}]"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts to go through; long rows are left to the ops without a weight matrix, which would be huge."""
        return tuple(layout for layout in LAYOUTS if not (self.has_weight and layout.shape[-1] > 1000))

    @property
    def has_weight(self) -> bool:
        """Whether the op contains a matrix product or a convolution."""
        return any(argument.name == "weight" for argument in self.tensors)

    def arguments(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        *,
        parameter_dtype: torch.dtype | None = None,
        arrange: Arrangement = contiguous,
        device: torch.device | str = "cpu",
        seed: int = 0,
        parameter_seed: int = 0,
        requires_grad: bool = False,
    ) -> dict[str, Tensor]:
        """Draw the tensor arguments, by name.

        Args:
            shape: that of the data; where an op needs more dimensions, as feature maps do, ones are put in front.
            dtype: of the data.
            parameter_dtype: of everything else; that of the data by default.
            arrange: how the data lies in memory.
            device: where.
            seed: of the data; the same seed gives the same values, rounded to the dtype, on every device.
            parameter_seed: of everything else.
            requires_grad: of every tensor.
        """
        data = generator("data", seed)
        parameters = generator("parameters", parameter_seed)
        drawn = {}
        for argument in self.tensors:
            values = argument.draw(argument.shape(shape), data if argument.is_data else parameters)
            values = values.to(dtype if argument.is_data else parameter_dtype or dtype).to(device)
            drawn[argument.name] = (arrange(values) if argument.is_data else values).requires_grad_(requires_grad)
        return drawn

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Call the public function."""
        return as_tuple(PUBLIC_OPS[self.op].function(**tensors, **self.constants))

    def reference(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Call the op's definition."""
        return as_tuple(PUBLIC_OPS[self.op].reference(**tensors, **self.constants))

    def plain_expression(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What a user of eager PyTorch would write: every operation in the dtype of the data.

        Parameters are cast to that dtype first; only the norms are summed in float32 (float64 for float64), since
        nobody would sum them in half precision. Horner's rule for polynomials, :mod:`torch.nn.functional` for
        activations, their derivatives by formula, gradients by autograd.
        """
        return self.plain({**tensors, **self.constants})


def generator(purpose: str, seed: int) -> torch.Generator:
    """Random numbers that are independent for different purposes, even with the same seed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An op's results, always as a tuple."""
    return (results,) if isinstance(results, Tensor) else results


# ---- how arguments are drawn --------------------------------------------------------------------------------------

TANGENTS = 3
EXTRA_FEATURES = 4  # of the output of a linear layer over its input, so that a mix-up of the two shows


def _normal(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _uniform(shape: Shape, generator: torch.Generator) -> Tensor:
    # Bounded: with normal data the largest element would decide every error of an eighth power, by its size alone.
    # Leaning to one side: sums of odd powers do not cancel.
    return 5 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 2


def _coefficients(shape: Shape, generator: torch.Generator) -> Tensor:
    # Divided by k!, so that high degrees stay within the range of float16.
    factorials = torch.tensor([math.factorial(power) for power in range(shape[0])], dtype=torch.float64)
    return _normal(shape, generator) / factorials.reshape(-1, *[1] * (len(shape) - 1))


def _squares(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1


def _weights(shape: Shape, generator: torch.Generator) -> Tensor:
    # So that z is of the size 1/2: the sums of the float16 expression then overflow at no degree.
    return _normal(shape, generator) / math.sqrt(16 * max(1, shape[-1]))


def _filters(shape: Shape, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator) / math.sqrt(16 * max(1, math.prod(shape[1:])))


def _biases(shape: Shape, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator) / 4


def _maps(data: Shape) -> Shape:
    """The shape of feature maps ``(B, C, *spatial)``."""
    return data if len(data) > 1 else (1, *data)


Z = TensorArgument("z", lambda z: z, _uniform, is_data=True)
Z_DOT = TensorArgument("z_dot", lambda z: (TANGENTS, *z), _uniform, is_data=True)
X = TensorArgument("x", lambda x: x, _uniform, is_data=True)
MAPS = TensorArgument("z", _maps, _uniform, is_data=True)
TAP_SQ = TensorArgument("tap_sq", lambda data: _maps(data)[1:], _squares)
CHANNEL_TAP_SQ = TensorArgument("tap_sq", lambda data: _maps(data)[1:2], _squares)
ROW_SQ = TensorArgument("row_sq", lambda z: (z[-1],), _squares)
WEIGHT = TensorArgument("weight", lambda x: (x[-1] + EXTRA_FEATURES, x[-1]), _weights)
BIAS = TensorArgument("bias", lambda x: (x[-1] + EXTRA_FEATURES,), _biases)


def _images(data: Shape, sizes: int) -> Shape:
    """The shape ``(B, C, *spatial)`` of images with so many spatial sizes, none of them and not C being 0."""
    small = (4, 3)[-sizes:]
    if len(data) < 2 + sizes:
        data = _maps(data)
        data = (*data, *small[len(data) - 2 :])
    batch = math.prod(data[: -1 - sizes])
    return (batch, *(max(1, size) for size in data[-1 - sizes :]))


def _grouped_images(data: Shape, sizes: int) -> Shape:
    """The same with an even number of channels, for two groups."""
    batch, channels, *spatial = _images(data, sizes)
    return (batch, channels + channels % 2, *spatial)


WINDOW = (3, 2)  # another number of taps in each dimension, so that a mix-up of the two shows


def _convolution_arguments(
    images: Callable[[Shape, int], Shape], sizes: int, groups: int
) -> tuple[TensorArgument, ...]:
    """``x``, ``weight`` and ``bias`` of a convolution with so many spatial sizes."""

    def filters(data: Shape) -> int:
        return images(data, sizes)[1] + EXTRA_FEATURES

    return (
        TensorArgument("x", lambda data: images(data, sizes), _uniform, is_data=True),
        TensorArgument(
            "weight",
            lambda data: (filters(data), images(data, sizes)[1] // groups, *WINDOW[:sizes]),
            _filters,
        ),
        TensorArgument("bias", lambda data: (filters(data),), _biases),
    )


def _coeffs(degree: int, channels: Callable[[Shape], int] | None) -> TensorArgument:
    """One polynomial for each of so many channels, or one that they share."""

    def shape(data: Shape) -> Shape:
        return (degree + 1,) if channels is None else (degree + 1, channels(data))

    return TensorArgument("coeffs", shape, _coefficients)


def _last(data: Shape) -> int:
    return data[-1]


def _features(data: Shape) -> int:
    return data[-1] + EXTRA_FEATURES


# ---- the same-dtype PyTorch expressions -----------------------------------------------------------------------------


def _function(arguments: Arguments, dtype: torch.dtype) -> ScalarFunction:
    if "kind" in arguments:
        return Activation(arguments["kind"])
    return polynomial_of(arguments["coeffs"].to(dtype), arguments.get("rectified", False))


def _norm(squares: Tensor) -> Tensor:
    return squares.sum(-1, dtype=torch.float64 if squares.dtype == torch.float64 else torch.float32)


def _plain_value(arguments: Arguments) -> tuple[Tensor, ...]:
    z = arguments["z"]
    return _function(arguments, z.dtype).derivatives(z, 0)


def _plain_dreg(arguments: Arguments) -> tuple[Tensor, ...]:
    z = arguments["z"]
    value, slope = _function(arguments, z.dtype).derivatives(z, 1)
    squares = slope.square()
    if arguments.get("row_sq") is not None:
        squares = squares * arguments["row_sq"].to(z.dtype)
    results = (value, _norm(squares))
    return (*results, slope) if arguments.get("return_derivative") else results


def _plain_spatial_dreg(arguments: Arguments) -> tuple[Tensor, ...]:
    z = arguments["z"].movedim(1, -1)
    tap_sq = arguments.get("tap_sq")
    value, slope = _function(arguments, z.dtype).derivatives(z, 1)
    squares = slope.square()
    if tap_sq is not None:
        squares = squares * tap_sq.to(z.dtype).movedim(0, -1)
    return value.movedim(-1, 1), _norm(squares.flatten(1))


def _plain_tangent(arguments: Arguments) -> tuple[Tensor, ...]:
    z = arguments["z"]
    value, slope = _function(arguments, z.dtype).derivatives(z, 1)
    y_dot = slope * arguments["z_dot"]
    return value, y_dot, _norm(y_dot.square())


def _plain_linear_dreg(arguments: Arguments) -> tuple[Tensor, ...]:
    x = arguments["x"]
    weight = arguments["weight"].to(x.dtype)
    bias = arguments["bias"]
    z = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return _plain_dreg({**arguments, "z": z, "row_sq": weight.square().sum(1)})


def _plain_conv(arguments: Arguments) -> tuple[Tensor, ...]:
    x = arguments["x"]
    weight = arguments["weight"].to(x.dtype)
    bias = arguments["bias"]
    convolve = F.conv1d if weight.dim() == 3 else F.conv2d
    where = {name: arguments[name] for name in ("stride", "padding", "dilation")}
    s = convolve(x, weight, None if bias is None else bias.to(x.dtype), groups=arguments["groups"], **where)
    image = torch.ones_like(x[:1, :1])[0] if len(x) else x.new_ones(1, *x.shape[2:])
    taps = convolve(image, weight.square().sum(1, keepdim=True), **where)
    return _plain_spatial_dreg({"z": s, "coeffs": arguments["coeffs"], "tap_sq": taps})


def _plain_conv_value(arguments: Arguments) -> tuple[Tensor, ...]:
    return _plain_conv(arguments)[:1]


# ---- the table ----------------------------------------------------------------------------------------------------


def _each_polynomial() -> list[tuple[str, int, bool]]:
    return [
        (f"degree {degree}, {'per channel' if per_channel else 'shared'}", degree, per_channel)
        for degree in range(1, MAX_DEGREE + 1)
        for per_channel in (False, True)
    ]


def _polynomial() -> list[Case]:
    return [
        Case(
            "polynomial",
            form,
            (Z, _coeffs(degree, _last if per_channel else None)),
            {},
            ("y",),
            _plain_value,
            degree == 3,
        )
        for form, degree, per_channel in _each_polynomial()
    ]


def _dreg(op: str, form: str, function: tuple[TensorArgument, ...], kind: dict[str, str], quick: bool) -> list[Case]:
    """The four combinations of ``row_sq`` and ``return_derivative``; the last two only where quick."""
    cases = []
    for with_derivative in (False, True):
        for with_row_sq in (True, False):
            words = [form, *(["row_sq"] if with_row_sq else []), *(["derivative"] if with_derivative else [])]
            tensors = (Z, *function, *((ROW_SQ,) if with_row_sq else ()))
            outputs = ("y", "jac_sq", *(("derivative",) if with_derivative else ()))
            constants = {**kind, "return_derivative": with_derivative}
            if quick or not with_derivative:
                cases.append(Case(op, ", ".join(words), tensors, constants, outputs, _plain_dreg, quick))
    return cases


def _polynomial_dreg() -> list[Case]:
    return [
        case
        for form, degree, per_channel in _each_polynomial()
        for case in _dreg("polynomial_dreg", form, (_coeffs(degree, _last if per_channel else None),), {}, degree == 3)
    ]


RECTIFIED = {"rectified": True}
TANGENT_OUTPUTS = ("y", "y_dot", "tangent_sq")


def _rectified() -> list[Case]:
    """``p(relu(z))`` in every op that has it; for what does not depend on the function there are the other cases."""
    shared, per_channel = _coeffs(3, None), _coeffs(3, _last)
    norm = ("y", "jac_sq")

    def case(
        op: str,
        form: str,
        tensors: tuple[TensorArgument, ...],
        outputs: tuple[str, ...],
        plain: Callable[[Arguments], tuple[Tensor, ...]],
        constants: Mapping[str, Any] = RECTIFIED,
    ) -> Case:
        return Case(op, f"rectified, {form}", tensors, constants, outputs, plain, representative=False)

    return [
        case("polynomial", "degree 3, shared", (Z, shared), ("y",), _plain_value),
        case("polynomial", "degree 8, per channel", (Z, _coeffs(8, _last)), ("y",), _plain_value),
        case("polynomial_dreg", "degree 3, shared", (Z, shared), norm, _plain_dreg),
        case(
            "polynomial_dreg",
            "degree 3, per channel, row_sq, derivative",
            (Z, per_channel, ROW_SQ),
            (*norm, "derivative"),
            _plain_dreg,
            {**RECTIFIED, "return_derivative": True},
        ),
        case("polynomial_spatial_dreg", "degree 3, shared, tap_sq", (MAPS, shared, TAP_SQ), norm, _plain_spatial_dreg),
        case("polynomial_tangent", "degree 3, per channel", (Z, Z_DOT, per_channel), TANGENT_OUTPUTS, _plain_tangent),
    ]


QUICK_KINDS = ("relu", "mish")


def _activation_dreg() -> list[Case]:
    return [
        case
        for kind in ACTIVATION_KINDS
        for case in _dreg("activation_dreg", kind, (), {"kind": kind}, kind in QUICK_KINDS)
    ]


def _spatial(op: str, form: str, function: tuple[TensorArgument, ...], kind: dict[str, str], quick: bool) -> list[Case]:
    """With ``tap_sq`` for every element, and where quick also for every channel and without."""
    forms = {", tap_sq": (TAP_SQ,), ", tap_sq for each channel": (CHANNEL_TAP_SQ,), "": ()}
    return [
        Case(op, form + words, (MAPS, *function, *taps), kind, ("y", "jac_sq"), _plain_spatial_dreg, quick)
        for words, taps in forms.items()
        if quick or taps == (TAP_SQ,)
    ]


def _polynomial_spatial_dreg() -> list[Case]:
    return [
        case
        for form, degree, per_channel in _each_polynomial()
        for case in _spatial(
            "polynomial_spatial_dreg",
            form,
            (_coeffs(degree, (lambda data: _maps(data)[1]) if per_channel else None),),
            {},
            degree == 3,
        )
    ]


def _activation_spatial_dreg() -> list[Case]:
    return [
        case
        for kind in ACTIVATION_KINDS
        for case in _spatial("activation_spatial_dreg", kind, (), {"kind": kind}, kind in QUICK_KINDS)
    ]


def _polynomial_tangent() -> list[Case]:
    return [
        Case(
            "polynomial_tangent",
            form,
            (Z, Z_DOT, _coeffs(degree, _last if per_channel else None)),
            {},
            TANGENT_OUTPUTS,
            _plain_tangent,
            degree == 3,
        )
        for form, degree, per_channel in _each_polynomial()
    ]


def _activation_tangent() -> list[Case]:
    return [
        Case(
            "activation_tangent",
            kind,
            (Z, Z_DOT),
            {"kind": kind},
            TANGENT_OUTPUTS,
            _plain_tangent,
            kind in QUICK_KINDS,
        )
        for kind in ACTIVATION_KINDS
    ]


def _linear(
    op: str, form: str, function: tuple[TensorArgument, ...], constants: dict[str, Any], quick: bool
) -> list[Case]:
    """With a bias, and where quick also without."""
    cases = [
        Case(op, f"{form}, bias", (X, WEIGHT, BIAS, *function), constants, ("y", "jac_sq"), _plain_linear_dreg, quick)
    ]
    if quick:
        without_bias = {**constants, "bias": None}
        cases.append(Case(op, form, (X, WEIGHT, *function), without_bias, ("y", "jac_sq"), _plain_linear_dreg, quick))
    return cases


def _linear_polynomial_dreg() -> list[Case]:
    return [
        case
        for form, degree, per_channel in _each_polynomial()
        for case in _linear(
            "linear_polynomial_dreg", form, (_coeffs(degree, _features if per_channel else None),), {}, degree == 3
        )
    ]


def _linear_activation_dreg() -> list[Case]:
    return [
        case
        for kind in ACTIVATION_KINDS
        for case in _linear("linear_activation_dreg", kind, (), {"kind": kind}, kind in QUICK_KINDS)
    ]


def _first_size(argument: TensorArgument, data: Shape) -> int:
    return argument.shape(data)[0]


def _convolutions(sizes: int, with_norm: bool) -> list[Case]:
    """Polynomials for each filter with a bias, padding and dilation; shared ones with groups, a stride and no bias."""
    op = f"polynomial_conv{sizes}d{'_dreg' if with_norm else ''}"
    outputs = ("y", "jac_sq") if with_norm else ("y",)
    plain = _plain_conv if with_norm else _plain_conv_value
    padding = (2, 1)[:sizes]
    cases = []
    for form, degree, per_channel in _each_polynomial():
        if degree != 3 and not (with_norm and sizes == 2):
            continue
        x, weight, bias = _convolution_arguments(
            _images if per_channel else _grouped_images, sizes, 1 + (not per_channel)
        )
        constants: dict[str, Any] = {"padding": padding}
        if per_channel:
            tensors: tuple[TensorArgument, ...] = (x, weight, bias, _coeffs(degree, partial(_first_size, weight)))
            constants |= {"stride": 1, "dilation": 2, "groups": 1}
        else:
            tensors = (x, weight, _coeffs(degree, None))
            constants |= {"stride": 2, "dilation": 1, "groups": 2, "bias": None}
        words = f"{form}, {'bias' if per_channel else 'groups'}"
        cases.append(Case(op, words, tensors, constants, outputs, plain, degree == 3))
    return cases


CASES: tuple[Case, ...] = (
    *_polynomial(),
    *_polynomial_dreg(),
    *_activation_dreg(),
    *_polynomial_spatial_dreg(),
    *_activation_spatial_dreg(),
    *_polynomial_tangent(),
    *_rectified(),
    *_activation_tangent(),
    *(case for sizes in (1, 2) for with_norm in (False, True) for case in _convolutions(sizes, with_norm)),
    *_linear_polynomial_dreg(),
    *_linear_activation_dreg(),
)
"""Every op with every form of its arguments."""

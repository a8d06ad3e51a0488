r"""Polynomial-kernel convolutions: ``y = p(conv(x, W) + b)`` (SPEC 2.4).

Each module is the convolution of :mod:`torch.nn` with the same arguments, ``state_dict`` keys and initial weights, and
a polynomial of its output, computed by :func:`chainzrule_kernels.polynomial_conv2d` in the same pass. The published
kernels differ in how they build the coefficients and in nothing else.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chainzrule_kernels import _checks, coefficients
from chainzrule_kernels.coefficients import check_degree, check_flag
from chainzrule_kernels.functions import Polynomial
from chainzrule_kernels.functions.base import ScalarFunction
from chainzrule_kernels.nn.jacobian_record import (
    ActivationRecords,
    JacobianRecord,
    LearnablePolynomial,
    active_record,
)
from chainzrule_kernels.nn.polynomial import check_noise, reset_coefficients
from chainzrule_kernels.nn.scalar_parameters import ScalarParameters
from chainzrule_kernels.ops._convolution import geometry
from chainzrule_kernels.ops.polynomial.op import polynomial
from chainzrule_kernels.ops.polynomial_conv1d.op import polynomial_conv1d
from chainzrule_kernels.ops.polynomial_conv1d_dreg.op import polynomial_conv1d_dreg
from chainzrule_kernels.ops.polynomial_conv2d.op import polynomial_conv2d
from chainzrule_kernels.ops.polynomial_conv2d_dreg.op import polynomial_conv2d_dreg
from chainzrule_kernels.ops.squared_weights.op import squared_taps

Numbers = int | tuple[int, ...]
Self = TypeVar("Self", bound="PolynomialConvolution")


class PolynomialConvolution(nn.modules.conv._ConvNd):
    """What every polynomial-kernel convolution shares: all but the coefficients.

    Attributes:
        degree: of the polynomial.
    """

    jacobian_record: JacobianRecord | ActivationRecords | None = None  # set on the instance by DREG

    _plain: ClassVar[type[nn.modules.conv._ConvNd]]
    _convolution: ClassVar[Any]
    _polynomial_convolution: ClassVar[Any]
    _polynomial_convolution_dreg: ClassVar[Any]

    degree: int

    @classmethod
    def from_conv(cls: type[Self], conv: Any, **polynomial: Any) -> Self:
        """This module with the parameters of ``conv``: the very ``weight`` and ``bias``, as an optimizer knows them.

        Args:
            conv: a :class:`torch.nn.Conv1d` or :class:`torch.nn.Conv2d`, as this class is one-dimensional or
                two-dimensional. Not changed.
            **polynomial: the arguments of the constructor that the convolution does not have, such as ``degree``.

        Raises:
            TypeError: when ``conv`` is something else.
            ValueError: when its weight is not a parameter, as under weight norm, or not there yet, as in a lazy
                module.
        """
        if reason := cls.why_not_from(conv):
            raise (ValueError if isinstance(conv, cls._plain) else TypeError)(f"conv: {reason}")
        build: Any = cls
        module: Self = build(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",  # the weight is there already, and no random number is to be drawn for another
            dtype=conv.weight.dtype,
            **polynomial,
        )
        module.weight, module.bias = conv.weight, conv.bias
        for name, parameter in module.named_parameters():
            if parameter is not conv.weight and parameter is not conv.bias:
                here = torch.empty_like(parameter, device=conv.weight.device)
                module.register_parameter(name, nn.Parameter(here, requires_grad=parameter.requires_grad))
        module.reset_polynomial()
        return module.train(conv.training)

    @classmethod
    def why_not_from(cls, conv: Any) -> str | None:
        """Why :meth:`from_conv` refuses ``conv``, or None."""
        plain = cls._plain
        name = f"torch.nn.{plain.__name__}"
        if not isinstance(conv, plain):
            return f"expected a {name}, got {type(conv).__name__}"
        if type(conv).forward is not plain.forward or "forward" in conv.__dict__:
            return f"expected a {name}, got a {type(conv).__name__} with a forward of its own"
        if isinstance(conv.weight, nn.UninitializedParameter):
            return f"expected a {name} with a weight, got one that has not run yet"
        if "weight" not in conv._parameters:
            return f"expected a {name} whose weight is a parameter, got one whose weight is computed from others"
        return None

    def coefficients(self) -> Tensor:
        """``coeffs``, ``(D+1,)`` or ``(D+1, out_channels)``, as a differentiable function of the parameters."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its coefficients are")

    def reset_polynomial(self) -> None:
        """Start the parameters of the polynomial again."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its polynomial starts")

    @property
    def inner_bias(self) -> Tensor | None:
        """What is added to the convolution before the polynomial."""
        return self.bias

    def reset_parameters(self) -> None:
        """Start again: weight and bias as the convolution of :mod:`torch.nn`, and the polynomial."""
        super().reset_parameters()
        # The constructor of that convolution comes here before the polynomial has its parameters.
        if "degree" in self.__dict__:
            self.reset_polynomial()

    def forward(self, x: Tensor) -> Tensor:
        """``p(conv(x, W) + b)``."""
        _checks.check_floating("x", x)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.stride)
        arguments = (
            x,
            self.weight,
            self.inner_bias,
            self.coefficients(),
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
        record = active_record(self)
        if not isinstance(record, JacobianRecord):
            return self._polynomial_convolution(*arguments)
        return self._recorded(record, *arguments)

    def _recorded(
        self, record: JacobianRecord, x: Tensor, weight: Tensor, bias: Tensor | None, coeffs: Tensor, *where: Any
    ) -> Tensor:
        """``p(conv(x, W) + b)``, with the Jacobian norm recorded."""
        with_weight = record.linear is self
        spatial = len(self.stride)
        if with_weight and not record.forward_pass.measures_nonlinearity:
            y, jac_sq = self._polynomial_convolution_dreg(x, weight, bias, coeffs, *where)
            record.add(jac_sq, math.prod(y.shape[-1 - spatial :]))
            return y
        z = self._convolution(x, weight, bias, *where)
        tap_sq = squared_taps(weight, x, geometry(weight.shape[2:], *where[:3])) if with_weight else None
        return record.apply(_PolynomialOfChannels(coeffs, spatial), z, tap_sq, spatial)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{super().extra_repr()}, degree={self.degree}"


class _PolynomialOfChannels(LearnablePolynomial):
    """A polynomial for each channel of feature maps, or one for all, as records call it."""

    def __init__(self, coeffs: Tensor, spatial: int) -> None:
        super().__init__(coeffs)
        self.channels = -1 - spatial

    @property
    def scalar(self) -> ScalarFunction:
        """The function of one number."""
        coeffs = self.coeffs
        return Polynomial(coeffs.reshape(*coeffs.shape, *(1,) * (-1 - self.channels)) if coeffs.dim() == 2 else coeffs)

    def value(self, z: Tensor) -> Tensor:
        """``y`` alone."""
        return polynomial(z.movedim(self.channels, -1), self.coeffs).movedim(-1, self.channels)


class _Convolution1d(PolynomialConvolution, nn.Conv1d):
    _plain = nn.Conv1d
    _convolution = staticmethod(F.conv1d)
    _polynomial_convolution = staticmethod(polynomial_conv1d)
    _polynomial_convolution_dreg = staticmethod(polynomial_conv1d_dreg)


class _Convolution2d(PolynomialConvolution, nn.Conv2d):
    _plain = nn.Conv2d
    _convolution = staticmethod(F.conv2d)
    _polynomial_convolution = staticmethod(polynomial_conv2d)
    _polynomial_convolution_dreg = staticmethod(polynomial_conv2d_dreg)


class _LearnedCoefficients(PolynomialConvolution):
    """Coefficients that are parameters themselves."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: str | Numbers = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        degree: int = 3,
        per_channel: bool = False,
        noise: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_flag("bias", bias)
        check_degree(degree)
        check_flag("per_channel", per_channel)
        check_noise(noise)
        convolution = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        arguments: tuple[Any, ...] = *convolution, device, dtype
        super().__init__(*arguments)
        self.degree = degree
        self.per_channel = per_channel
        self.noise = noise
        shape = (degree + 1, out_channels) if per_channel else (degree + 1,)
        self.coeffs = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_polynomial()

    def reset_polynomial(self) -> None:
        """Start the polynomial again at the identity with noise."""
        reset_coefficients(self.coeffs, self.noise)

    def coefficients(self) -> Tensor:
        """The parameter ``coeffs``."""
        return self.coeffs

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{super().extra_repr()}, per_channel={self.per_channel}"


class PolynomialConv1d(_LearnedCoefficients, _Convolution1d):
    r"""``y = p(conv1d(x, W) + b)``, ``p`` a polynomial with learnable coefficients (ChainzRule's layer, convolutional).

    The arguments are those of :class:`torch.nn.Conv1d`, ``padding="same"`` included, and:

    Args:
        degree: D of the polynomial, 1 to 8.
        per_channel: whether each output channel has its own polynomial; otherwise all share one [a choice of this
            package].
        noise: the standard deviation of the normal noise around the identity ``(0, 1, 0, …, 0)`` with which the
            coefficients start [a choice of this package].
        device, dtype: of the parameters.

    Shape:
        ``(B, in_channels, L) -> (B, out_channels, L')`` or the same without ``B``, in the dtype of the input.

    Attributes:
        weight: ``(out_channels, in_channels / groups, kernel_size)``.
        bias: ``(out_channels,)`` or None.
        coeffs: ``(D+1,)`` or ``(D+1, out_channels)``, in ascending powers.

    Raises:
        TypeError, ValueError: for arguments out of range.

    With zero padding a position outside has ``s = b``, so that the polynomial of it is ``p(b)`` and not 0. A
    ``padding_mode`` other than ``"zeros"`` pads the input first; the Jacobian that DREG penalises is then that with
    respect to the padded input.
    """


class PolynomialConv2d(_LearnedCoefficients, _Convolution2d):
    r"""``y = p(conv2d(x, W) + b)``, ``p`` a polynomial with learnable coefficients (ChainzRule's layer, convolutional).

    The two-dimensional :class:`PolynomialConv1d`: the arguments are those of :class:`torch.nn.Conv2d` and of that.

    Shape:
        ``(B, in_channels, H, W) -> (B, out_channels, H', W')`` or the same without ``B``, in the dtype of the input.
    """


class _ShiftedPowerConv2d(ScalarParameters, _Convolution2d):
    """``(s + c)^degree`` and its relatives."""

    c: nn.Parameter

    def __init__(
        self, *convolution: Any, degree: int, starts: dict[str, float], learnable: bool, device: Any, dtype: Any
    ) -> None:
        check_flag("bias", convolution[7])
        check_degree(degree)
        arguments: tuple[Any, ...] = *convolution, device, dtype
        super().__init__(*arguments)
        self.degree = degree
        self.add_scalars(starts, learnable, device, dtype)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{super().extra_repr()}, {self.describe_scalars()}"


class PKNConv2d(_ShiftedPowerConv2d):
    r"""``y = (s + c)^degree``, ``s = conv2d(x, W) + b``: the kernel of PolyKervNets (SaTML 2023).

    The arguments are those of :class:`torch.nn.Conv2d`, except that there is no bias by default, as published, and:

    Args:
        degree: the power, 1 to 8; the authors' code calls it ``dp`` and has 2.
        c: where the learnable shift starts; ``cp`` there, 1.0.
        learnable: whether ``c`` is learned.
        device, dtype: of the parameters.

    Shape:
        ``(B, in_channels, H, W) -> (B, out_channels, H', W')`` or the same without ``B``, in the dtype of the input.

    Attributes:
        weight, bias: as in :class:`torch.nn.Conv2d`.
        c: a 0-d parameter.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: str | Numbers = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        degree: int = 2,
        c: float = 1.0,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            degree=degree, starts={"c": c}, learnable=learnable, device=device, dtype=dtype,
        )  # fmt: skip

    def coefficients(self) -> Tensor:
        """``coeffs (degree+1,)``, see :func:`chainzrule_kernels.coefficients.pkn`."""
        return coefficients.pkn(1.0, self.c, self.degree)


class RPKNConv2d(_ShiftedPowerConv2d):
    r"""``y = a (s + c)^degree``, ``s = conv2d(x, W) + b``, ``a > 0``: Regularized PolyKervNets (arXiv 2312.15229).

    The arguments are those of :class:`torch.nn.Conv2d`, except that there is no bias by default, as published, and:

    Args:
        degree: the power, 1 to 8; the authors' code calls it ``dp`` and has 2.
        a: where the learnable scale starts, above 0; ``ap`` there, 0.009. A tenth of the leading coefficient of the
            least-squares quadratic of ReLU on [-5, 5], which ``ck.coefficients.least_squares_relu()[0]`` is.
        c: where the learnable shift starts; ``cp`` there, 0.47.
        learnable: whether ``a`` and ``c`` are learned.
        device, dtype: of the parameters.

    Shape:
        ``(B, in_channels, H, W) -> (B, out_channels, H', W')`` or the same without ``B``, in the dtype of the input.

    Attributes:
        weight, bias: as in :class:`torch.nn.Conv2d`.
        log_a: a 0-d parameter, the logarithm of ``a``, which is thereby above 0 whatever the optimizer does [a choice
            of this package]. The authors' code learns ``a`` itself and leaves its sign open; a batch norm behind the
            layer divides ``a`` out, so that its gradient grows as ``1 / a``, and steps of a usual size throw it far
            past 0.
        a: the number itself, 0-d and differentiable; read only.
        c: a 0-d parameter.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    log_a: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: str | Numbers = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        degree: int = 2,
        a: float = 0.009,
        c: float = 0.47,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        coefficients.check_number("a", a)
        if a <= 0:
            raise ValueError(f"a: expected a number above 0, got {a}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            degree=degree, starts={"log_a": math.log(a), "c": c}, learnable=learnable, device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def a(self) -> Tensor:
        """``exp(log_a)``, above 0: 0-d and differentiable."""
        return self.log_a.exp()

    def shown_starts(self) -> dict[str, float]:
        """Where ``a`` and ``c`` start."""
        return {"a": math.exp(self._starts["log_a"]), "c": self._starts["c"]}

    def coefficients(self) -> Tensor:
        """``coeffs (degree+1,)``, see :func:`chainzrule_kernels.coefficients.pkn`."""
        return coefficients.pkn(self.a, self.c, self.degree)


class KervConv2d(_ShiftedPowerConv2d):
    r"""``y = (s + c)^degree + bias``, ``s = conv2d(x, W)``: polynomial kervolution (CVPR 2019, arXiv 1904.03955).

    The arguments are those of :class:`torch.nn.Conv2d`, with the bias behind the power, as in the authors' code, and:

    Args:
        degree: the power, 1 to 8; the authors' code calls it ``power`` and has 3.
        c: the shift, ``balance`` there, 1.0.
        learnable: whether ``c`` is learned; not by default, as published.
        device, dtype: of the parameters.

    Shape:
        ``(B, in_channels, H, W) -> (B, out_channels, H', W')`` or the same without ``B``, in the dtype of the input.

    Attributes:
        weight, bias: as in :class:`torch.nn.Conv2d`.
        c: a 0-d parameter.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: str | Numbers = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        degree: int = 3,
        c: float = 1.0,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            degree=degree, starts={"c": c}, learnable=learnable, device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def inner_bias(self) -> None:
        """Nothing is added before the power."""
        return None

    def coefficients(self) -> Tensor:
        """``coeffs (degree+1,)``, or ``(degree+1, out_channels)`` with a bias, the offset of each channel."""
        return coefficients.pkn(1.0, self.c, self.degree, 0.0 if self.bias is None else self.bias)

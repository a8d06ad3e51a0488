r"""Builders of ``coeffs`` from the parameterisations in the literature.

Every polynomial of this package is evaluated by one engine, ``p(z) = c0 + c1 z + … + cD z^D``. A layer with other
parameters builds ``coeffs`` from them on each forward pass with one of these functions, differentiably, and hands the
result to :func:`chainzrule_kernels.polynomial` or one of its relatives.

A parameter is a number, a 0-d tensor, or a tensor of shape ``(N,)`` with one value for each channel; shapes
broadcast. The result is ``(D+1,)``, or ``(D+1, N)`` when a parameter is per channel, in ascending powers, with the
dtype and device of the tensors given, or PyTorch's default dtype when all are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainzrule_kernels.functions import MAX_DEGREE

__all__ = ["hermite", "hermite_start", "identity", "least_squares_relu", "monomial", "pkn", "polyrelu", "react"]

Parameter = Tensor | float


def pkn(a: Parameter, c: Parameter, degree: int, offset: Parameter = 0.0) -> Tensor:
    r"""``a (s + c)^degree + offset``: the kernel of PolyKervNets, by the binomial theorem.

    ``c_k = a · binomial(degree, k) · c^(degree-k)``, and ``offset`` is added to ``c_0``. With ``a = 1`` it is PKN and
    polynomial kervolution (CVPR 2019, arXiv 1904.03955; the offset is its bias after the power), with ``a > 0``
    learnable R-PKN (arXiv 2312.15229; the authors start at ``a = 0.009, c = 0.47, degree = 2``).

    Args:
        a: the scale.
        c: the shift.
        degree: the power, 1 to 8.
        offset: added to the value.

    Returns:
        ``coeffs`` of shape ``(degree+1,)`` or ``(degree+1, N)``.

    Raises:
        TypeError, ValueError: for a degree out of range, or parameters that are not numbers or floating 0-d or 1-d
            tensors.
    """
    check_degree(degree)
    # A product or a sum with its neutral element would cost as much as the others.
    has_scale = isinstance(a, Tensor) or a != 1
    has_offset = isinstance(offset, Tensor) or offset != 0
    a, c, offset = _broadcast(a=a, c=c, offset=offset)
    powers = [torch.ones_like(c), c]
    while len(powers) <= degree:
        powers.append(powers[-1] * c)
    counts = [math.comb(degree, power) for power in range(degree + 1)]
    coeffs = torch.stack(
        [power if count == 1 else power * count for power, count in zip(reversed(powers), counts, strict=True)]
    )
    if has_scale:
        coeffs = coeffs * a
    return torch.cat((coeffs[:1] + offset, coeffs[1:])) if has_offset else coeffs


def react(a: Parameter, b: Parameter, c: Parameter, degree: int = 2) -> Tensor:
    r"""``a x^degree + b x + c``: ReactPKN, a quadratic in the place of ReLU (PolyKervNets, arXiv 2312.15229).

    The authors start at ``(0.009, 0.5, 0.47)``. That is the least-squares quadratic of ReLU on [-5, 5] but for ``a``,
    which is a tenth of it: :func:`least_squares_relu` has the quadratic itself.

    Args:
        a: the coefficient of the highest power.
        b: the coefficient of ``x``.
        c: the value at 0.
        degree: the highest power, 1 to 8.

    Returns:
        ``coeffs`` of shape ``(degree+1,)`` or ``(degree+1, N)``.

    Raises:
        TypeError, ValueError: for a degree out of range, or parameters that are not numbers or floating 0-d or 1-d
            tensors.
    """
    check_degree(degree)
    a, b, c = _broadcast(a=a, b=b, c=c)
    if degree == 1:
        return torch.stack([c, a + b])
    return torch.stack([c, b, *[torch.zeros_like(a)] * (degree - 2), a])


def polyrelu(weight: Tensor, bias: Tensor) -> Tensor:
    r"""``bias + Σ_k weight_k u^k``, ``k = 1 … D``, to be evaluated at ``u = relu(x)``: PolyReLU (PolyCom, 2411.03884).

    The authors' code starts at ``weight = (1/3, 1/3, 1/3)`` and ``bias = 0``.

    Args:
        weight: ``(D,)`` or ``(D, N)``, in ascending powers, ``1 <= D <= 8``.
        bias: a 0-d tensor, or ``(N,)`` when ``weight`` is per channel.

    Returns:
        ``coeffs`` of shape ``(D+1,)`` or ``(D+1, N)``.

    Raises:
        TypeError, ValueError: for tensors that are not floating or not of such shapes.
    """
    for name, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point torch.Tensor, got {_describe(value)}")
    if weight.dim() not in (1, 2) or not 1 <= weight.shape[0] <= MAX_DEGREE:
        raise ValueError(
            f"weight: expected shape (D,) or (D, N) with D between 1 and {MAX_DEGREE}, got {tuple(weight.shape)}"
        )
    if bias.shape not in (torch.Size([]), weight.shape[1:]):
        raise ValueError(f"bias: expected a 0-d tensor or shape {tuple(weight.shape[1:])}, got {tuple(bias.shape)}")
    return torch.cat([bias.expand(weight.shape[1:]).unsqueeze(0), weight])


def hermite(a: Tensor) -> Tensor:
    r"""``Σ_k a_k He_k(x) / k!``, with the probabilists' Hermite polynomials (torchortho, arXiv 2502.01247).

    Args:
        a: ``(D+1,)`` or ``(D+1, N)``, ``1 <= D <= 8``; :func:`hermite_start` has the authors' initial values.

    Returns:
        ``coeffs`` of the shape and dtype of ``a``.

    Raises:
        TypeError, ValueError: when ``a`` is not a floating tensor of such a shape.
    """
    if not isinstance(a, Tensor) or not a.is_floating_point():
        raise TypeError(f"a: expected a floating-point torch.Tensor, got {_describe(a)}")
    if a.dim() not in (1, 2) or not 2 <= a.shape[0] <= MAX_DEGREE + 1:
        raise ValueError(
            f"a: expected shape (D+1,) or (D+1, N) with D between 1 and {MAX_DEGREE}, got {tuple(a.shape)}"
        )
    basis = torch.tensor(_hermite_basis(a.shape[0] - 1), dtype=a.dtype, device=a.device)
    return basis @ a


def hermite_start(
    degree: int,
    num_channels: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""The initial ``a`` of :func:`hermite`: ``a_0 = sqrt(1 - 1/D!) / sqrt(e)``, every other ``a_k = 1 / sqrt(e)``.

    Shape ``(degree+1,)``, or ``(degree+1, num_channels)`` (torchortho, arXiv 2502.01247).

    Raises:
        TypeError, ValueError: for a degree or a number of channels out of range.
    """
    check_degree(degree)
    values = [math.exp(-0.5)] * (degree + 1)
    values[0] *= math.sqrt(1 - 1 / math.factorial(degree))
    return _constant(values, num_channels, dtype, device)


def monomial(
    power: int,
    degree: int | None = None,
    num_channels: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""``z^power`` as a polynomial of ``degree``, which is ``power`` by default.

    Shape ``(degree+1,)``, or ``(degree+1, num_channels)``.

    Raises:
        TypeError, ValueError: for a degree or a number of channels out of range, or a power above the degree.
    """
    degree = power if degree is None else degree
    check_degree(degree)
    if not isinstance(power, int) or isinstance(power, bool):
        raise TypeError(f"power: expected an int, got {type(power).__name__}")
    if not 0 <= power <= degree:
        raise ValueError(f"power: expected 0 to {degree}, the degree, got {power}")
    return _constant([float(k == power) for k in range(degree + 1)], num_channels, dtype, device)


def identity(
    degree: int = 3,
    num_channels: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""``p(z) = z``: ``(0, 1, 0, …, 0)``, where the layers of :mod:`chainzrule_kernels.nn` start, before noise.

    Shape ``(degree+1,)``, or ``(degree+1, num_channels)``.

    Raises:
        TypeError, ValueError: for a degree or a number of channels out of range.
    """
    return monomial(1, degree, num_channels, dtype=dtype, device=device)


def least_squares_relu(half_width: float = 5.0) -> tuple[float, float, float]:
    r"""``(a, b, c)`` of the quadratic ``a x² + b x + c`` nearest to ReLU on ``[-L, L]`` in the mean square.

    With ``L`` the half width, ``a = 15 / (32 L)``, ``b = 1/2``, ``c = 3 L / 32``; for ``L = 5`` about ``(0.094, 0.5,
    0.469)``. An alternative start for :func:`react`.

    Raises:
        TypeError, ValueError: when the half width is not a positive, finite number.
    """
    if not isinstance(half_width, int | float) or isinstance(half_width, bool):
        raise TypeError(f"half_width: expected a number, got {type(half_width).__name__}")
    if not (math.isfinite(half_width) and half_width > 0):
        raise ValueError(f"half_width: expected a positive, finite number, got {half_width}")
    return 15 / (32 * half_width), 0.5, 3 * half_width / 32


def check_degree(degree: Any) -> None:
    """Raise unless ``degree`` is an int from 1 to 8."""
    if not isinstance(degree, int) or isinstance(degree, bool):
        raise TypeError(f"degree: expected an int between 1 and {MAX_DEGREE}, got {type(degree).__name__}")
    if not 1 <= degree <= MAX_DEGREE:
        raise ValueError(f"degree: expected 1 to {MAX_DEGREE}, got {degree}")


def check_count(name: str, value: Any) -> None:
    """Raise unless ``value`` is an int of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")


def check_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def _constant(
    values: Sequence[float],
    num_channels: int | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    coeffs = torch.tensor(values, dtype=dtype, device=device)
    if num_channels is None:
        return coeffs
    check_count("num_channels", num_channels)
    return coeffs[:, None].repeat(1, num_channels)


def _broadcast(**parameters: Parameter) -> Sequence[Tensor]:
    """The parameters as tensors of one shape, dtype and device."""
    tensors = [value for value in parameters.values() if isinstance(value, Tensor)]
    for name, value in parameters.items():
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise TypeError(f"{name}: expected a floating-point tensor, got dtype {value.dtype}")
            if value.dim() > 1:
                raise ValueError(f"{name}: expected a 0-d tensor or shape (N,), got {tuple(value.shape)}")
            if value.device != tensors[0].device:
                raise ValueError(f"{name}: expected device {tensors[0].device}, got {value.device}")
        elif not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number or a torch.Tensor, got {type(value).__name__}")
    dtype = torch.get_default_dtype()
    if tensors:
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
    device = tensors[0].device if tensors else None
    values = [torch.as_tensor(value, dtype=dtype, device=device) for value in parameters.values()]
    channels = {value.shape[0] for value in values if value.dim() == 1}
    if len(channels) > 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in zip(parameters, values, strict=True))
        raise ValueError(f"{', '.join(parameters)}: expected one number of channels, got {shapes}")
    return torch.broadcast_tensors(*values)


def _hermite_basis(degree: int) -> list[list[float]]:
    """Entry ``[j][k]``: the coefficient of ``x^j`` in ``He_k(x) / k!``, by ``He_(k+1) = x He_k - k He_(k-1)``."""
    polynomials = [[1], [0, 1]]
    for k in range(1, degree):
        shifted = [0, *polynomials[k]]
        for power, coefficient in enumerate(polynomials[k - 1]):
            shifted[power] -= k * coefficient
        polynomials.append(shifted)
    return [
        [polynomials[k][j] / math.factorial(k) if j <= k else 0.0 for k in range(degree + 1)] for j in range(degree + 1)
    ]


def _describe(value: Any) -> str:
    return f"a tensor of dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__

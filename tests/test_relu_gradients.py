"""Gradients and tangents that are infinite or NaN: where relu is flat none of them passes, as in PyTorch.

``torch.relu`` selects and does not multiply by a slope of 0, in reverse and in forward mode. Comparisons are exact:
every number here is 0, infinite, NaN, or an integer that each dtype has.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from shared import assert_same, each_dtype
from torch import Tensor

import chainzrule_kernels as ck

# In 24 channels: whole vectors, and what is left behind them.
Z = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 2.0, 3.0, math.inf, math.nan] * 3)[None]
NUMBERS = (math.inf, -math.inf, math.nan)
COEFFS = torch.tensor([0.0, 2.0, 1.0])
PER_CHANNEL = COEFFS[:, None].expand(3, 24)

RELU: dict[str, Callable[[Tensor], Tensor]] = {
    "activation_dreg": lambda z: ck.activation_dreg(z, "relu")[0],
    "activation_spatial_dreg": lambda z: ck.activation_spatial_dreg(z[..., None], "relu")[0][..., 0],
    "activation_tangent": lambda z: ck.activation_tangent(z, torch.ones_like(z)[None], "relu")[0],
}
RECTIFIED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "polynomial": lambda z, c: ck.polynomial(z, c, rectified=True),
    "polynomial_dreg": lambda z, c: ck.polynomial_dreg(z, c, rectified=True)[0],
    "polynomial_spatial_dreg": lambda z, c: ck.polynomial_spatial_dreg(z[..., None], c, rectified=True)[0][..., 0],
    "polynomial_tangent": lambda z, c: ck.polynomial_tangent(z, torch.ones_like(z)[None], c, rectified=True)[0],
}


def plain_polynomial(z: Tensor) -> Tensor:
    """The polynomial with ``COEFFS`` of ``relu(z)``."""
    return (torch.relu(z) + 2) * torch.relu(z)


@pytest.fixture(params=["kernel", "reference"])
def anywhere(request: pytest.FixtureRequest, device: str) -> str:
    """The device, with the kernels on it in force, and then the reference."""
    if request.param == "reference":
        request.getfixturevalue("monkeypatch").setattr(ck.backends, "choose", lambda op, *arguments: "reference")
    return device


def assert_same_derivatives(found: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """The same backward, forward mode, and gradient of the backward in what arrives, for each of ``NUMBERS``."""
    for number in NUMBERS:
        arriving = torch.full_like(z, number)
        results = []
        for function in (found, expected):
            leaf, cotangent = z.clone().requires_grad_(), torch.zeros_like(z, requires_grad=True)
            (gradient,) = torch.autograd.grad(function(leaf), leaf, cotangent, create_graph=True)
            results.append(
                [
                    *torch.autograd.grad(function(leaf), leaf, arriving),
                    *torch.autograd.grad(gradient, cotangent, arriving),
                    torch.func.jvp(function, (z,), (arriving,))[1],
                ]
            )
        assert_same(*results, rtol=0, atol=0)


@each_dtype()
@pytest.mark.parametrize("op", RELU)
def test_relu(op: str, dtype: torch.dtype, anywhere: str) -> None:
    assert_same_derivatives(RELU[op], torch.relu, Z.to(anywhere, dtype))


@pytest.mark.parametrize("coeffs", [COEFFS, PER_CHANNEL], ids=["shared", "per channel"])
@pytest.mark.parametrize("op", RECTIFIED)
def test_rectified(op: str, coeffs: Tensor, anywhere: str) -> None:
    coeffs = coeffs.to(anywhere)
    assert_same_derivatives(lambda z: RECTIFIED[op](z, coeffs), plain_polynomial, Z.to(anywhere))


@pytest.mark.parametrize("infinite", ["tangent", "gradient"])
@pytest.mark.parametrize("kind", ["relu", "shared", "per channel"])
@each_dtype((torch.float32, torch.float64, torch.bfloat16))
def test_tangents(kind: str, infinite: str, dtype: torch.dtype, anywhere: str) -> None:
    z = Z.to(anywhere, dtype)

    def found(z: Tensor, z_dot: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "relu":
            return ck.activation_tangent(z, z_dot[None], "relu")[1:]
        coeffs = (COEFFS if kind == "shared" else PER_CHANNEL).to(z.device)
        return ck.polynomial_tangent(z, z_dot[None], coeffs, rectified=True)[1:]

    def expected(z: Tensor, z_dot: Tensor) -> tuple[Tensor, Tensor]:
        _, y_dot = torch.func.jvp(torch.relu if kind == "relu" else plain_polynomial, (z,), (z_dot,))
        return y_dot[None], y_dot[None].to(torch.float64 if dtype == torch.float64 else torch.float32).square().sum(-1)

    for number in NUMBERS:
        special, ones = torch.full_like(z, number), torch.ones_like(z)
        z_dot, arriving = (special, ones) if infinite == "tangent" else (ones, special)
        results = []
        for function in (found, expected):
            leaves = (z.clone().requires_grad_(), z_dot.clone().requires_grad_())
            y_dot, tangent_sq = function(*leaves)
            of_y_dot = torch.autograd.grad(y_dot, leaves, arriving[None], retain_graph=True, materialize_grads=True)
            of_norm = torch.autograd.grad(
                tangent_sq, leaves, arriving[:, :1].to(tangent_sq.dtype), materialize_grads=True
            )
            results.append([y_dot.detach(), *of_y_dot, *of_norm])
        assert_same(*results, rtol=0, atol=0)

"""Every op against the float64 reference, and what the allowance for its errors means."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from shared import (
    DTYPES,
    REPRESENTATIVE,
    TORCH_ACTIVATIONS,
    differentiate,
    each,
    each_dtype,
    gradients_for,
    is_linear,
)

import chainzrule_kernels as ck
from chainzrule_kernels.functions import Activation
from chainzrule_kernels.ops import PUBLIC_OPS
from chainzrule_kernels.testing.accuracy import Accuracy, compare, error_of, measure
from chainzrule_kernels.testing.cases import CASES, Case
from chainzrule_kernels.testing.layouts import LAYOUTS, Layout, contiguous

HALF = (torch.bfloat16, torch.float16)


def _failures(case: Case, layout: Layout, dtype: torch.dtype, parameter_dtype: torch.dtype, device: str) -> list[str]:
    (judged,) = measure(case, layout, dtype, parameter_dtype, ["auto"], device).values()
    return [f"{layout.name}: {accuracy}" for accuracy in judged if not accuracy.passed]


@each_dtype()
@each(CASES)
def test_errors_stay_within_the_allowance(case: Case, dtype: torch.dtype, target: tuple[str, str]) -> None:
    assert _failures(case, LAYOUTS[0], dtype, dtype, target[0]) == []


@each_dtype()
@each(REPRESENTATIVE)
def test_errors_stay_within_the_allowance_on_every_layout(
    case: Case, dtype: torch.dtype, target: tuple[str, str]
) -> None:
    parameter_dtype = torch.float32 if dtype in HALF else dtype
    judged = [_failures(case, layout, dtype, parameter_dtype, target[0]) for layout in case.layouts[1:]]
    assert [failure for failures in judged for failure in failures] == []


@each_dtype()
@each([case for case in REPRESENTATIVE if len(case.tensors) > 1])
def test_parameters_may_differ_in_dtype(case: Case, dtype: torch.dtype, target: tuple[str, str]) -> None:
    for parameter_dtype in DTYPES:
        tensors = case.arguments((3, 4, 9), dtype, parameter_dtype=parameter_dtype, device=target[0])
        found = differentiate(case, tensors)
        expected = differentiate(case.reference, tensors)
        information = torch.finfo(max((dtype, parameter_dtype), key=lambda d: torch.finfo(d).eps))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            allowed = 64 * information.eps * max(1.0, other.abs().max().item())
            assert error_of(one, other.double()) <= allowed, parameter_dtype


def test_the_table_holds_every_public_op() -> None:
    assert {case.op for case in CASES} == set(PUBLIC_OPS)
    assert len({case.name for case in CASES}) == len(CASES)


@each(CASES)
def test_the_plain_expression_is_the_same_function(case: Case) -> None:
    # In float64, where the two can only differ by rounding.
    tensors = case.arguments((3, 4, 5), torch.float64)
    found = differentiate(case.plain_expression, tensors)
    for one, other in zip(found, differentiate(case.reference, tensors), strict=True):
        torch.testing.assert_close(one, other)


# ---- R13: half precision ------------------------------------------------------------------------------------------


# Not the linear ops: their z is rounded to half precision before the norm is taken.
@each_dtype(HALF)
@each([case for case in REPRESENTATIVE if len(case.outputs) > 1 and not is_linear(case)])
def test_r13_sums_of_half_precision_data_are_float32(case: Case, dtype: torch.dtype, target: tuple[str, str]) -> None:
    tensors = case.arguments((4, 64), dtype, parameter_dtype=torch.float32, device=target[0])
    exact = case.reference({name: value.double() for name, value in tensors.items()})
    (norm_at,) = (index for index, name in enumerate(case.outputs) if name in ("jac_sq", "tangent_sq"))
    norm = case(tensors)[norm_at]
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact[norm_at], rtol=1e-5, atol=1e-5)


def test_r13_a_cubic_of_float16_overflows_nowhere_but_in_the_result(target: tuple[str, str]) -> None:
    z = torch.full((3, 5), 100.0, dtype=torch.float16, device=target[0], requires_grad=True)
    coeffs = torch.tensor([0.0, 1.0, 0.0, 0.01], device=target[0], requires_grad=True)  # z³ itself is 10⁶
    y, jac_sq, derivative = ck.polynomial_dreg(z, coeffs, return_derivative=True)
    assert torch.equal(y, torch.full_like(y, 10100.0))
    assert torch.equal(derivative, torch.full_like(derivative, 301.0))
    torch.testing.assert_close(jac_sq, torch.full_like(jac_sq, 5 * 301.0**2))
    (y.float().sum() * 1e-4 + jac_sq.sum() * 1e-6).backward()
    assert z.grad is not None
    assert coeffs.grad is not None
    assert z.grad.isfinite().all()
    assert coeffs.grad.isfinite().all()
    exact = 15 * (1e6 * 1e-4 + 2 * 301 * 3e4 * 1e-6)
    torch.testing.assert_close(coeffs.grad[3].item(), exact, rtol=2e-3, atol=0.0)


@each_dtype((torch.float16,))
def test_r13_an_overflowing_result_is_infinite_as_the_rounded_exact_one(
    dtype: torch.dtype, target: tuple[str, str]
) -> None:
    z = torch.tensor([[40.0, 41.0, -41.0, 2.0]], dtype=dtype, device=target[0])
    y = ck.polynomial(z, torch.tensor([0.0, 0.0, 0.0, 1.0], device=target[0]))
    assert y.tolist() == [[64000.0, math.inf, -math.inf, 8.0]]


# ---- far out --------------------------------------------------------------------------------------------------------


@each_dtype()
@pytest.mark.parametrize("kind", ck.ACTIVATION_KINDS)
def test_activations_far_from_zero(kind: str, dtype: torch.dtype, target: tuple[str, str]) -> None:
    # Absolute error: what cancels towards the tails is small against 1, and so is what may be lost there.
    z = torch.cat([torch.linspace(-120, 120, 2401, dtype=torch.float64), torch.linspace(-0.1, 0.1, 41).double()])
    z = z.to(dtype).to(target[0]).unsqueeze(0)
    results = differentiate(lambda t: ck.activation_dreg(t["z"], kind, return_derivative=True), {"z": z})
    doubles = {"z": z.double()}
    exact = differentiate(
        lambda t: ck.reference.activation_dreg(t["z"], kind, return_derivative=True),
        doubles,
        [gradient.double() for gradient in gradients_for(results[:3])],
    )
    for found, expected in zip(results, exact, strict=True):
        assert found.isfinite().all()
        scale = expected.abs().clamp_min(1.0)
        eps_allowed = 8 if target[1] in ck.backends.BACKENDS else 64  # the plain-PyTorch formulas cancel a little more
        tolerance = eps_allowed * torch.finfo(found.dtype).eps if found.dtype != torch.float64 else 1e-13
        assert ((found.double() - expected).abs() / scale).max().item() <= tolerance


def _in_float64(kind: str, z: torch.Tensor) -> torch.Tensor:
    """An activation in float64, whose tails are right, and those of its gradient.

    They are lost by ``1 + erf``, ``1 + tanh`` and ``1 - tanh²``.
    """
    if kind == "gelu":
        return z * 0.5 * torch.special.erfc(z * -math.sqrt(0.5))
    if kind == "gelu_tanh":
        return z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    if kind == "tanh":
        decay = -2 * torch.where(z < 0, -z, z)
        magnitude = -torch.expm1(decay) / (1 + torch.exp(decay))
        return torch.where(z < 0, -magnitude, magnitude)
    return TORCH_ACTIVATIONS[kind](z) if kind != "softplus" else F.softplus(z, threshold=40)


@pytest.mark.parametrize("kind", [kind for kind in ck.ACTIVATION_KINDS if kind != "relu"])
def test_activations_over_the_range_of_float32(kind: str, target: tuple[str, str]) -> None:
    # The rule of the allowance, for the numbers between powers of two, tails and subnormal results included.
    if target != ("cpu", "cpu"):
        pytest.skip("these are the elementary functions of the CPU kernels")
    bits = torch.arange(-(2**31), 2**31, 8191, dtype=torch.int64).to(torch.int32)
    numbers = bits.view(torch.float32)
    numbers = numbers[numbers.isfinite()]
    y, _, slope = ck.activation_dreg(numbers.unsqueeze(0), kind, return_derivative=True)
    found = {"y": y[0], "slope": slope[0]}
    plain, exact = {}, {}
    for results, z, function in (
        (plain, numbers.clone().requires_grad_(), TORCH_ACTIVATIONS[kind]),
        (exact, numbers.double().requires_grad_(), lambda z: _in_float64(kind, z)),
    ):
        value = function(z)
        results["y"], results["slope"] = value.detach(), torch.autograd.grad(value.sum(), z)[0]
    # Up to 1/2, then up to each power of two, on either side.
    parts = (torch.frexp(numbers)[1].clamp(-1, 6) + 2) * torch.where(numbers.signbit(), -1, 1)
    failed = []
    for part in parts.unique():
        here = parts == part
        for quantity, values in found.items():
            both = here & exact[quantity].float().isfinite() & plain[quantity].isfinite()
            error = (plain[quantity].double() - exact[quantity])[both].abs().max().item()
            judged = compare(quantity, values[here], exact[quantity][here], error, torch.float32)
            if not judged.passed:
                failed.append((part.item(), judged))
    assert failed == []
    special = torch.tensor([[0.0, -0.0, math.inf, math.nan]])
    of_special = ck.activation_dreg(special, kind)[0]
    torch.testing.assert_close(of_special.double(), _in_float64(kind, special.double()), equal_nan=True)
    assert torch.equal(of_special[:, :2].signbit(), TORCH_ACTIVATIONS[kind](special[:, :2]).signbit())


# ---- the allowance itself -------------------------------------------------------------------------------------------


def test_the_allowance_is_twice_the_plain_error_and_one_ulp() -> None:
    exact = torch.tensor([1.0, -8.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    judged = compare("y", torch.tensor([1.0, -8.0]), exact, plain_error=1e-6, dtype=torch.float32)
    assert judged.allowance == 2e-6 + 8 * eps
    assert judged.error == 0.0
    assert judged.passed
    assert not compare("y", torch.tensor([1.0, -8.00001]), exact, plain_error=1e-6, dtype=torch.float32).passed
    assert not Accuracy("y", error=1.0, allowance=0.5).passed


def test_a_wrongly_infinite_or_finite_element_is_an_infinite_error() -> None:
    exact = torch.tensor([1.0, 1e6, math.nan], dtype=torch.float64)
    right = torch.tensor([1.0, math.inf, math.nan], dtype=torch.float16)
    assert error_of(right, exact) == 0.0
    for wrong in (
        [math.inf, math.inf, math.nan],
        [1.0, 65504.0, math.nan],
        [1.0, -math.inf, math.nan],
        [1.0, math.inf, 0.0],
    ):
        assert error_of(torch.tensor(wrong, dtype=torch.float16), exact) == math.inf
    assert error_of(torch.tensor([math.nan, math.inf, math.nan], dtype=torch.float16), exact) == math.inf


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    # The check itself must be able to fail: drop one term of a gradient.
    case = next(case for case in CASES if case.op == "polynomial_dreg" and case.representative)

    def without_the_norm(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        y, jac_sq = ck.reference.polynomial_dreg(**tensors)
        return y, jac_sq.detach() + 0 * y.sum(-1)

    monkeypatch.setattr(Case, "__call__", lambda self, tensors: without_the_norm(dict(tensors)))
    (judged,) = measure(case, Layout("contiguous", (4, 5), contiguous), torch.float32, torch.float32, ["auto"]).values()
    assert {accuracy.quantity for accuracy in judged if not accuracy.passed} == {"d z", "d coeffs", "d row_sq"}


# ---- the definitions against PyTorch's own activations ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ck.ACTIVATION_KINDS)
def test_derivatives_of_activations_are_those_of_pytorch(kind: str) -> None:
    z = torch.linspace(-12, 12, 241, dtype=torch.float64).requires_grad_()
    expected = TORCH_ACTIVATIONS[kind](z)
    for order, formula in enumerate(Activation(kind).derivatives(z, 3)):
        torch.testing.assert_close(formula.detach(), expected.detach(), rtol=1e-9, atol=1e-11, msg=f"order {order}")
        if expected.requires_grad:
            (expected,) = torch.autograd.grad(expected.sum(), z, create_graph=True, materialize_grads=True)
        else:
            expected = torch.zeros_like(z)

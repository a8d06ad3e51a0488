"""Feature maps: sizes at which the kernels cut an image differently, layouts, the norm at the borders of an image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from shared import REPRESENTATIVE, assert_bitwise, differentiate, each, gradients_for
from torch import Tensor

import chainzrule_kernels as ck
from chainzrule_kernels.testing.accuracy import error_of
from chainzrule_kernels.testing.cases import Case
from chainzrule_kernels.testing.layouts import channels_innermost, contiguous, permuted, transposed

pytestmark = pytest.mark.usefixtures("target")

SPATIAL = [case for case in REPRESENTATIVE if case.op.endswith("_spatial_dreg")]
# Several tiles to an image, several images to a tile, few and many channels, one channel, one spatial size, three.
SHAPES = (
    (3, 70, 33, 31),
    (20, 3, 61, 50),
    (2, 1500, 5, 3),
    (2, 9000, 2),
    (5, 1, 90, 101),
    (3, 6, 9000),
    (2, 5, 3, 40, 31),
)


def _arranged(
    case: Case, shape: tuple[int, ...], device: str, arrange: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    return case.arguments(shape, arrange=arrange, device=device)


@pytest.mark.parametrize("arrange", [contiguous, channels_innermost], ids=lambda arrange: arrange.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each(SPATIAL)
def test_images_of_every_size(
    case: Case, shape: tuple[int, ...], arrange: Callable[[Tensor], Tensor], device: str
) -> None:
    tensors = _arranged(case, shape, device, arrange)
    gradients = gradients_for(case(tensors))
    found = differentiate(case, tensors, gradients)
    doubles = {name: value.double() for name, value in tensors.items()}
    exact = differentiate(case.reference, doubles, [gradient.double() for gradient in gradients])
    for one, other in zip(found, exact, strict=True):
        assert error_of(one, other) <= 1e-5 * other.abs().max().item()


@pytest.mark.parametrize("arrange", [contiguous, channels_innermost], ids=lambda arrange: arrange.__name__)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@each(SPATIAL)
def test_r12_images_have_the_same_bits_for_any_number_of_threads(
    case: Case, shape: tuple[int, ...], arrange: Callable[[Tensor], Tensor], device: str, compiled: bool, threads: None
) -> None:
    tensors = _arranged(case, shape, device, arrange)
    torch.set_num_threads(1)
    first = differentiate(case, tensors)
    for count in (2, 3) if compiled else (1, 1):
        torch.set_num_threads(count)
        assert_bitwise(differentiate(case, tensors), first)


@each(SPATIAL)
def test_images_without_a_position_give_gradients_of_zero(case: Case, device: str) -> None:
    for positions in (2, 0):  # what the first leaves in memory must not be the second's
        tensors = case.arguments((5, 17, positions, 3), device=device)
        gradients = differentiate(case, tensors)[-len(tensors) :]
    for name, gradient in zip(tensors, gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensors[name])), name


@each(SPATIAL)
def test_results_keep_the_channels_where_the_input_has_them(case: Case, device: str) -> None:
    for shape, arrange, kept in (
        ((2, 5, 3, 4), contiguous, False),
        ((2, 5, 3, 4), channels_innermost, True),
        ((2, 5, 3, 4), permuted, False),
        ((2, 5, 7), channels_innermost, True),
    ):
        tensors = _arranged(case, shape, device, arrange)
        tensors["z"].requires_grad_()
        y, _ = case(tensors)
        (gradient,) = torch.autograd.grad(y.sum(), tensors["z"])
        for maps in (y, gradient):
            assert maps.movedim(1, -1).is_contiguous() == kept
            assert maps.is_contiguous() != kept


@each(SPATIAL)
def test_images_without_a_spatial_size_are_samples(case: Case, device: str) -> None:
    tensors = case.arguments((6, 33), device=device)
    renamed = {{"tap_sq": "row_sq"}.get(name, name): value for name, value in tensors.items()}
    plain = getattr(ck, case.op.replace("_spatial", ""))
    for one, other in zip(case(tensors), plain(**renamed, **case.constants), strict=True):
        torch.testing.assert_close(one, other)


@each(SPATIAL)
def test_images_of_a_slice_of_channels_or_positions(case: Case, device: str) -> None:
    # Rows of an image with gaps between them, and images with gaps between them.
    for view in (
        lambda z: z[:, 2:7],
        lambda z: z[..., 1:4],
        lambda z: z[1::2],
        lambda z: z[:1].expand(3, *z.shape[1:]),
        transposed,
    ):
        for arrange in (contiguous, channels_innermost):
            z = view(arrange(case.arguments((4, 8, 6, 5), device=device)["z"]))
            tensors = {**case.arguments(tuple(z.shape), device=device), "z": z}
            expected = case({**tensors, "z": z.contiguous()})
            for one, other in zip(case(tensors), expected, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_the_norm_is_exact_at_the_borders(kind: str, device: str) -> None:
    numbers = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(shape, generator=numbers, dtype=torch.float64) for shape in ((2, 3, 5, 4), (6, 3, 3, 3)))
    x, weight = x.to(device), weight.to(device)

    def convolved(image: Tensor) -> Tensor:
        return F.conv2d(image, weight, padding=1, stride=2)

    # The squared weights of the taps that meet the image.
    tap_sq = F.conv2d(torch.ones_like(x[0]), weight.square(), padding=1, stride=2)
    _, jac_sq = ck.activation_spatial_dreg(convolved(x), kind, tap_sq)
    for image, found in zip(x, jac_sq, strict=True):
        jacobian = torch.func.jacrev(lambda i: {"relu": F.relu, "silu": F.silu}[kind](convolved(i)))(image)
        torch.testing.assert_close(found, jacobian.square().sum())


@pytest.mark.parametrize("rectified", [False, True])
def test_a_shared_polynomial_keeps_the_channels_where_the_input_has_them(rectified: bool, device: str) -> None:
    # As elementwise operations of PyTorch do; under fake tensors too.
    from torch._subclasses import FakeTensorMode

    def function(z: Tensor, coeffs: Tensor) -> Tensor:
        return ck.polynomial(z, coeffs, rectified=rectified)

    numbers = torch.Generator().manual_seed(0)
    coeffs = torch.randn(4, generator=numbers).to(device)
    for shape in ((2, 5, 3, 4), (2, 5, 7), (1, 5, 1, 1)):
        for arrange in (contiguous, channels_innermost):
            z = arrange(torch.randn(shape, generator=numbers).to(device)).requires_grad_()
            y = function(z, coeffs)
            assert y.stride() == z.sin().stride()
            copy = z.detach().contiguous().requires_grad_()
            expected = function(copy, coeffs)
            (gradient,) = torch.autograd.grad(y.square().sum(), z)
            (expected_gradient,) = torch.autograd.grad(expected.square().sum(), copy)
            assert gradient.stride() == z.stride()
            # Only sums, those for the coefficients, follow the arrangement in memory.
            assert_bitwise([y, gradient], [expected, expected_gradient])
            with FakeTensorMode() as mode:
                assert function(mode.from_tensor(z), mode.from_tensor(coeffs)).stride() == y.stride()

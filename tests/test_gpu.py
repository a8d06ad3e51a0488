"""What only a GPU can show: more elements than 32 bits count, CUDA graphs, a second device, memory errors.

Everything else that is tested on CPU tensors is tested on CUDA tensors by the same tests (conftest.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from shared import FULLEST, assert_bitwise, assert_same, differentiate, each, each_dtype, is_linear

import chainzrule_kernels as ck
from chainzrule_kernels import _native_cuda
from chainzrule_kernels.ops import _linear_operator
from chainzrule_kernels.ops.linear_activation_dreg.op import operator as linear_activation
from chainzrule_kernels.ops.linear_polynomial_dreg.op import operator as linear_polynomial
from chainzrule_kernels.ops.polynomial_dreg.op import operators as polynomial_dreg
from chainzrule_kernels.testing.cases import Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: PyTorch sees no CUDA or ROCm device")
OWN = [case for case in FULLEST if not is_linear(case)]


# Several at a time would not fit into one GPU: pytest-xdist gives them to one process.
large = pytest.mark.xdist_group("large")


def needs_gigabytes(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"{gigabytes} GB of GPU memory are needed and {free / 1e9:.1f} GB are free")


@each(FULLEST)
def test_auto_prefers_triton(case: Case) -> None:
    tensors = case.arguments((4, 8), device="cuda")
    assert ck.explain(case.op, **tensors, **case.constants).backend == "triton"


# ---- R8: more than 2³¹ elements ------------------------------------------------------------------------------------


@large
@pytest.mark.parametrize("columns", [4096, 1 << 20, 8, 4097], ids=str)
def test_r08_more_than_two_to_the_31_elements(columns: int) -> None:
    rows = (1 << 31) // columns + 3
    needs_gigabytes(4 * 2 * rows * columns / 1e9 + 4)
    coeffs = torch.tensor([0.5, 1.0, -0.25, 0.125], device="cuda")
    z = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    for block in z.split(max(1, (1 << 27) // columns)):
        block.normal_()
    y, jac_sq, _ = polynomial_dreg.forward(z, None, coeffs, False, False)
    dz, _, dcoeffs = polynomial_dreg.backward(
        z, None, coeffs, z, torch.ones_like(jac_sq), None, False, True, False, True
    )
    # The first and the last rows alone; and the sum of the first coefficient's gradient, which is that of z.
    for part in (slice(0, 2), slice(rows - 2, rows)):
        alone = polynomial_dreg.forward.definition(z[part], None, coeffs, False, False)
        assert_same([y[part], jac_sq[part]], alone[:2], rtol=2e-2, atol=1e-2)
        arguments = (z[part], None, coeffs, z[part], torch.ones(2, device="cuda"), None, False, True, False, True)
        assert_same([dz[part]], polynomial_dreg.backward.definition(*arguments)[:1], rtol=2e-2, atol=1e-2)
    blocks = z.split(max(1, (1 << 27) // columns))
    total = sum(block.sum(dtype=torch.float64) for block in blocks)
    magnitude = sum(block.abs().sum(dtype=torch.float64) for block in blocks)
    assert abs(dcoeffs[0].double() - total) <= 1e-6 * magnitude


@large
def test_r08_a_product_with_more_than_two_to_the_31_results() -> None:
    columns, inner = 4096, 64
    rows = (1 << 31) // columns + 3
    needs_gigabytes(2 * 2 * rows * columns / 1e9 + 4)
    x, weight = (torch.randn(size, inner, device="cuda", dtype=torch.bfloat16) / 8 for size in (rows, columns))
    row_sq, coeffs = weight.float().square().sum(1), torch.tensor([0.5, 1.0, -0.25, 0.125], device="cuda")
    y, jac_sq, z = linear_polynomial(x, weight, None, row_sq, coeffs, True)
    for part in (slice(0, 200), slice(rows - 200, rows)):
        alone = linear_polynomial.definition(x[part].double(), weight.double(), None, row_sq, coeffs, True)
        assert_same([value[part].double() for value in (y, jac_sq, z)], alone, rtol=2e-2, atol=1e-2)


# ---- the product with its epilogue -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["shared", "per channel", "mish"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (70, 200, 24), (300, 136, 512), (5000, 1000, 64), (3000, 4096, 256)], ids=str
)
def test_product_with_epilogue(shape: tuple[int, int, int], dtype: torch.dtype, form: str) -> None:
    rows, columns, inner = shape
    x, weight = torch.randn(rows, inner, device="cuda"), torch.randn(columns, inner, device="cuda") / inner**0.5
    x, weight, bias = x.to(dtype), weight.to(dtype), torch.randn(columns, device="cuda").to(dtype)
    row_sq = weight.float().square().sum(1)
    coeffs = 0.3 * torch.randn((4, columns) if form == "per channel" else (4,), device="cuda")
    room, function = (linear_activation, "mish") if form == "mish" else (linear_polynomial, coeffs)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert _linear_operator.why_no_epilogue(x, weight, None if form == "mish" else coeffs, True) is None
        found = room(x, weight, bias, row_sq, function, True)
        assert_bitwise(room(x, weight, bias, row_sq, function, True), found)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    doubles = [
        value.double() if isinstance(value, torch.Tensor) else value for value in (x, weight, bias, row_sq, function)
    ]
    # Products of TF32 have the ten bits of float16 behind the point.
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10
    for one, other in zip(found, room.definition(*doubles, True), strict=True):
        assert (one.double() - other).abs().max() <= 2 * rounding * other.abs().max()


# ---- R9: the current stream, and CUDA graphs -------------------------------------------------------------------------


@each(OWN)
def test_r09_runs_on_the_current_stream(case: Case) -> None:
    tensors = case.arguments((64, 256), device="cuda")
    expected = differentiate(case, tensors)
    stream = torch.cuda.Stream()
    fresh = {name: torch.full_like(value, float("nan")) for name, value in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # The data arrive late: a kernel on another stream would see NaN.
        torch.cuda._sleep(50_000_000)
        for name, value in tensors.items():
            fresh[name].copy_(value)
        found = differentiate(case, fresh)
    torch.cuda.synchronize()
    assert_bitwise(found, expected)


@each(OWN)
def test_r09_cuda_graph(case: Case) -> None:
    tensors = case.arguments((64, 256), device="cuda")
    other = case.arguments((64, 256), device="cuda", seed=1)
    gradients = [torch.randn(result.shape, device="cuda").to(result) for result in case(tensors)]
    differentiate(case, tensors, gradients)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        differentiate(case, tensors, gradients)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate(case, tensors, gradients)
    for name, value in tensors.items():
        value.copy_(other[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_bitwise(captured, differentiate(case, other, gradients))


# ---- R10: a device that is not the current one -----------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a second GPU is needed")
@each(OWN)
def test_r10_second_device(case: Case) -> None:
    first = case.arguments((64, 256), device="cuda:0")
    second = {name: value.to("cuda:1") for name, value in first.items()}
    with torch.cuda.device(0):
        found = differentiate(case, second)
        assert all(value.device.index == 1 for value in found)
        assert torch.cuda.current_device() == 0
    assert_bitwise([value.to("cuda:0") for value in found], differentiate(case, first))


# ---- R14: a new shape compiles nothing -------------------------------------------------------------------------------


def test_r14_a_new_shape_compiles_nothing_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from chainzrule_kernels.ops import _call_triton, _dreg_triton

    monkeypatch.setattr(_call_triton, "COMPILE_AHEAD", True)
    _call_triton._compiled.clear()

    def run(*shape: int) -> None:
        z = torch.randn(*shape, device="cuda", dtype=torch.float16, requires_grad=True)
        y, jac_sq = ck.polynomial_dreg(z, torch.ones(3, device="cuda", requires_grad=True))
        (y.float().sum() + jac_sq.mean()).backward()

    def compiled() -> int:
        kernels = (_dreg_triton.dreg_forward_kernel, _dreg_triton.dreg_backward_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    run(4, 8)
    before = compiled()
    for shape in [(1, 1), (70, 37), (5000, 300), (5000, 301), (3, 9000), (3, 9001), (1, 64), (100_000, 3), (17,)]:
        run(*shape)
    assert compiled() == before


# ---- the fused convolution -------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "3x3": ((4, 64, 28, 28), (128, 64, 3, 3), (1, 1, 1)),
    "strided and dilated": ((3, 32, 23, 19), (72, 32, 3, 3), ((2, 1), (2, 1), (1, 2))),
    "1x1": ((2, 64, 17, 13), (256, 64, 1, 1), (1, 0, 1)),
    "7x7": ((2, 8, 33, 35), (64, 8, 7, 7), (2, 3, 1)),
    "rows and filters beside the blocks": ((1, 8, 3, 3), (8, 8, 3, 3), (1, 1, 1)),
}
needs_module = pytest.mark.skipif(
    _native_cuda.cuda is None, reason=f"no compiled CUDA convolution: {_native_cuda.missing_because}"
)


def convolution(shapes: str, dtype: torch.dtype, seed: int = 0) -> tuple[list[Any], tuple[Any, ...]]:
    """``x, weight, bias, coeffs`` that record gradients, and ``stride, padding, dilation``."""
    x_shape, weight_shape, where = CONVOLUTIONS[shapes]
    torch.manual_seed(seed)
    x = torch.randn(x_shape, device="cuda").to(dtype, memory_format=torch.channels_last)
    weight = (torch.randn(weight_shape, device="cuda") / torch.Size(weight_shape[1:]).numel() ** 0.5).to(dtype)
    bias = torch.randn(weight_shape[0], device="cuda").to(dtype)
    coeffs = 0.3 * torch.randn(4, weight_shape[0], device="cuda")
    return [value.requires_grad_() for value in (x, weight, bias, coeffs)], where


def run_convolution(tensors: list[Any], where: tuple[Any, ...]) -> list[torch.Tensor]:
    """Results and gradients."""
    y, jac_sq = ck.polynomial_conv2d_dreg(*tensors, *where)
    loss = (y.float() * 0.5).sum() + jac_sq.sum() / jac_sq.numel()
    return [y.detach(), jac_sq.detach(), *torch.autograd.grad(loss, tensors)]


@needs_module
@each_dtype((torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("shapes", CONVOLUTIONS)
def test_convolution_against_float64(shapes: str, dtype: torch.dtype, tf32: bool) -> None:
    if tf32 and dtype != torch.float32:
        pytest.skip("TF32 is a setting of float32")
    tensors, where = convolution(shapes, dtype)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        with ck.backend("cuda"):
            assert ck.explain("polynomial_conv2d_dreg", *tensors, *where).backend == "cuda"
            found = run_convolution(tensors, where)
            again = run_convolution(tensors, where)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert_bitwise(found[:2], again[:2])
    with ck.backend("reference"):
        exact = run_convolution([value.detach().double().requires_grad_() for value in tensors], where)
    # One rounding of the data in units of the largest value; TF32 and bfloat16 keep 10 and 7 bits.
    allowed = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 4e-3 if tf32 else 1e-5}[dtype]
    for one, other in zip(found, exact, strict=True):
        assert (one.double() - other).abs().max() <= allowed * other.abs().max()


@needs_module
def test_r09_convolution_on_the_current_stream_and_in_a_graph() -> None:
    tensors, where = convolution("3x3", torch.bfloat16)
    others, _ = convolution("3x3", torch.bfloat16, seed=1)
    with ck.backend("cuda"), torch.no_grad():
        expected = ck.polynomial_conv2d_dreg(*others, *where)
        stream = torch.cuda.Stream()
        late = [torch.full_like(value, float("nan")) for value in others]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for one, other in zip(late, others, strict=True):
                one.copy_(other)
            found = ck.polynomial_conv2d_dreg(*late, *where)
        torch.cuda.synchronize()
        assert_bitwise(found, expected)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ck.polynomial_conv2d_dreg(*tensors, *where)
        for one, other in zip(tensors, others, strict=True):
            one.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(captured, expected)


@large
@needs_module
def test_r08_convolution_of_more_than_two_to_the_31_elements() -> None:
    needs_gigabytes(16)
    samples = (1 << 31) // (64 * 128 * 128) + 3
    x = torch.empty(samples, 64, 128, 128, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
    for part in x.split(128):
        part.normal_()
    weight = torch.randn(64, 64, 1, 1, device="cuda", dtype=torch.bfloat16) / 8
    coeffs = torch.tensor([0.5, 1.0, -0.25, 0.125], device="cuda")
    with ck.backend("cuda"), torch.no_grad():
        y, jac_sq = ck.polynomial_conv2d_dreg(x, weight, None, coeffs)
        for part in (slice(0, 2), slice(samples // 2, samples // 2 + 2), slice(samples - 2, samples)):
            assert_bitwise([y[part], jac_sq[part]], ck.polynomial_conv2d_dreg(x[part], weight, None, coeffs))


@needs_module
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a second GPU is needed")
def test_r10_convolution_on_a_second_device() -> None:
    tensors, where = convolution("3x3", torch.bfloat16)
    with ck.backend("cuda"), torch.no_grad(), torch.cuda.device(0):
        expected = ck.polynomial_conv2d_dreg(*tensors, *where)
        found = ck.polynomial_conv2d_dreg(*(value.to("cuda:1") for value in tensors), *where)
    assert_bitwise([value.to("cuda:0") for value in found], expected)


# ---- memory errors ---------------------------------------------------------------------------------------------------

SMALL = """
import os, sys, torch
import chainzrule_kernels as ck
for dtype in (torch.float32, torch.bfloat16):
    for shape in [(5, 37), (3, 75), (2, 4099), (4, 8), (1, 1), (300, 3), (4096, 67)]:
        z = torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)
        row_sq = torch.rand(shape[1], device="cuda", requires_grad=True)
        for coeffs in (torch.ones(4, device="cuda"), torch.ones(4, shape[1], device="cuda")):
            coeffs.requires_grad_()
            for weight in (None, row_sq):
                y, jac_sq = ck.polynomial_dreg(z, coeffs, weight)
                (y.float().sum() + jac_sq.sum()).backward()
            z_dot = torch.randn(2, *shape, device="cuda", dtype=dtype, requires_grad=True)
            sum(result.float().sum() for result in ck.polynomial_tangent(z, z_dot, coeffs)).backward()
if ck._native_cuda.cuda is not None:
    shapes = [((1, 8, 3, 3), (8, 8, 3, 3)), ((2, 24, 9, 7), (200, 24, 3, 2)), ((3, 16, 13, 5), (72, 16, 1, 1))]
    with ck.backend("cuda"), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for torch.backends.cudnn.allow_tf32 in (False, True):
                for x_shape, weight_shape in shapes:
                    x = torch.randn(x_shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
                    weight = torch.randn(weight_shape, device="cuda", dtype=dtype)
                    ck.polynomial_conv2d_dreg(x, weight, None, torch.ones(4, weight_shape[0], device="cuda"), 1, 1)
for rows, columns, inner in [(1, 8, 8), (70, 200, 24), (300, 136, 64)]:
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, jac_sq = ck.linear_polynomial_dreg(x, weight, None, torch.ones(4, device="cuda"))
    (y.float().sum() + jac_sq.sum()).backward()
for shape in [(2, 3, 5, 7), (3, 8, 4, 4)]:
    for layout in (torch.contiguous_format, torch.channels_last):
        z = torch.randn(*shape, device="cuda").to(memory_format=layout).requires_grad_()
        coeffs, tap_sq = torch.ones(4, shape[1], device="cuda"), torch.rand(shape[1:], device="cuda")
        y, jac_sq = ck.polynomial_spatial_dreg(z, coeffs, tap_sq)
        (y.sum() + jac_sq.sum()).backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    finished = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL],
        # PyTorch's cache would hide an access beyond a tensor.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CHAINZRULE_KERNELS_COMPILE_AHEAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "Device not supported" in finished.stdout + finished.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]

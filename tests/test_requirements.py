"""What users of fused-kernel packages ask for, for every op. R4, R5, R6, R13, R14, R15, R18 stand in files beside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from shared import (
    FULLEST,
    REPRESENTATIVE,
    assert_bitwise,
    assert_same,
    differentiate,
    each,
    each_dtype,
    gradients_for,
    is_linear,
    sums_as_memory_lies,
)
from torch import Tensor

import chainzrule_kernels as ck
from chainzrule_kernels.testing.cases import CASES, Case
from chainzrule_kernels.testing.layouts import LAYOUTS, Arrangement, Layout

pytestmark = pytest.mark.usefixtures("target")

ARRANGED = [layout for layout in LAYOUTS if layout.arrange is not LAYOUTS[0].arrange]

# ---- R7: layouts of what comes in and of what comes back -----------------------------------------------------------


@pytest.mark.parametrize("layout", ARRANGED, ids=lambda layout: layout.name)
@each(REPRESENTATIVE)
def test_r07_a_layout_changes_no_bit(case: Case, layout: Layout, device: str, compiled: bool) -> None:
    tensors = case.arguments((3, 4, 21), arrange=layout.arrange, device=device)
    copies = {name: value.contiguous() for name, value in tensors.items()}
    gradients = [layout.arrange(gradient) for gradient in gradients_for(case(tensors))]
    found = differentiate(case, tensors, gradients)
    expected = differentiate(case, copies, [gradient.contiguous() for gradient in gradients])
    if sums_as_memory_lies(case) or not compiled:  # a library's matrix product or sum may choose another order
        assert_same(found, expected, rtol=1e-5, atol=1e-4)
    else:
        assert_bitwise(found, expected)


@each(CASES)
def test_r07_expanded_gradient_of_a_sum(case: Case, device: str) -> None:
    # .sum().backward() hands an expanded gradient of stride 0 to the op.
    tensors = case.arguments((6, 5), device=device, requires_grad=True)
    results = case(tensors)
    sum(result.sum() for result in results).backward()
    expected = differentiate(case.reference, tensors, [torch.ones_like(result) for result in results])
    assert_same([value.grad for value in tensors.values()], expected[len(results) :], rtol=2e-4, atol=2e-3)


@each_dtype((torch.float32, torch.bfloat16))
@each(FULLEST)
def test_r07_parameters_need_not_be_contiguous(case: Case, dtype: torch.dtype, device: str, compiled: bool) -> None:
    def sparse(values: Tensor) -> Tensor:
        """Every second element of every dimension of a larger buffer."""
        buffer = torch.full([2 * size for size in values.shape], float("nan"), dtype=values.dtype, device=values.device)
        view = buffer[tuple(slice(None, None, 2) for _ in values.shape)]
        return view.copy_(values)

    tensors = case.arguments((4, 9), dtype, device=device)
    found = differentiate(case, {name: sparse(value) for name, value in tensors.items()})
    if is_linear(case) or not compiled:
        assert_same(found, differentiate(case, tensors))
    else:
        assert_bitwise(found, differentiate(case, tensors))


@each(FULLEST)
def test_r07_channels_last_images(case: Case, device: str) -> None:
    def channels_last(values: Tensor) -> Tensor:
        return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values

    tensors = case.arguments((2, 3, 5, 6), arrange=channels_last, device=device)
    found = differentiate(case, tensors)
    expected = differentiate(case, {name: value.contiguous() for name, value in tensors.items()})
    assert_same(found, expected, rtol=1e-5, atol=1e-5)


# ---- R11: nothing but PyTorch ---------------------------------------------------------------------------------------

BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "sklearn", "matplotlib", "rich") or name == "chainzrule_kernels._cpu":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import json, torch
from chainzrule_kernels import _native, backends
import chainzrule_kernels as ck
from chainzrule_kernels.testing.accuracy import results_and_gradients
from chainzrule_kernels.testing.cases import CASES

served = set()
for case in CASES:
    tensors = case.arguments((3, 5), requires_grad=True)
    served.add(ck.explain(case.op, **tensors, **case.constants).backend)
    results = case(tensors)
    sum(result.sum() for result in results).backward()
    assert all(value.grad.isfinite().all() for value in tensors.values() if value.grad is not None)
    # The registered operators too, on their plain-PyTorch kernels, as torch.compile would call them.
    gradients = [torch.ones_like(result) for result in results]
    expected = results_and_gradients(case, case, tensors, gradients)
    choose, backends.choose = backends.choose, lambda op, *arguments: "operators"
    found = results_and_gradients(case, case, tensors, gradients)
    backends.choose = choose
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-3)
print(json.dumps({"served": sorted(served), "native": _native.cpu is not None, "because": _native.missing_because}))
"""


def _in_new_process(code: str, **environment: str) -> dict[str, object]:
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize("switched_off", ["0", "1"])
def test_r11_runs_without_native_library_and_triton(switched_off: str) -> None:
    found = _in_new_process(BARE, CHAINZRULE_KERNELS_NO_NATIVE=switched_off)
    assert found["served"] == ["reference"]
    assert found["native"] is False
    assert ("CHAINZRULE_KERNELS_NO_NATIVE" if switched_off == "1" else "not installed") in str(found["because"])


# ---- R12: the same bits ---------------------------------------------------------------------------------------------

# Large enough to be shared between threads, with rows and columns that no block size divides.
LARGE = ((3000, 257), (7, 20000))


@pytest.mark.parametrize("shape", LARGE, ids=str)
@each([case for case in REPRESENTATIVE if not is_linear(case)])
def test_r12_same_bits_in_every_run_and_for_any_number_of_threads(
    case: Case, shape: tuple[int, int], device: str, compiled: bool, threads: None
) -> None:
    tensors = case.arguments(shape, device=device)
    torch.set_num_threads(1)
    first = differentiate(case, tensors)
    for count in (1, 2, 2, 3, 3) if compiled else (1, 1, 1, 1):
        torch.set_num_threads(count)
        assert_bitwise(differentiate(case, tensors), first)


@each_dtype((torch.float64, torch.bfloat16, torch.float16))
@each([case for case in FULLEST if not is_linear(case)])
def test_r12_same_bits_in_every_dtype(
    case: Case, dtype: torch.dtype, device: str, compiled: bool, threads: None
) -> None:
    tensors = case.arguments((2100, 129), dtype, parameter_dtype=torch.float32, device=device)
    torch.set_num_threads(1)
    first = differentiate(case, tensors)
    for count in (2, 3) if compiled else (1, 1):
        torch.set_num_threads(count)
        assert_bitwise(differentiate(case, tensors), first)


@each([case for case in FULLEST if is_linear(case)])
def test_r12_linear_same_bits_in_every_run(case: Case, device: str) -> None:
    # For one number of threads only: the matrix product is the library's.
    tensors = case.arguments((900, 64), device=device)
    first = differentiate(case, tensors)
    for _ in range(4):
        assert_bitwise(differentiate(case, tensors), first)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@each([case for case in REPRESENTATIVE if not is_linear(case)])
def test_r12_large_tensors_are_right_too(case: Case, shape: tuple[int, int], device: str) -> None:
    # A sum over many threads, against the definition in float64.
    tensors = case.arguments(shape, device=device)
    gradients = gradients_for(case(tensors))
    found = differentiate(case, tensors, gradients)
    doubles = {name: value.double() for name, value in tensors.items()}
    exact = differentiate(case.reference, doubles, [gradient.double() for gradient in gradients])
    for one, other in zip(found, exact, strict=True):
        error = (one.double() - other).abs().max().item()
        assert error <= 1e-5 * other.abs().max().item()


# ---- R16: sizes at the edge -----------------------------------------------------------------------------------------

EDGE_SHAPES = ((0, 5), (3, 0), (0, 0), (1, 1), (1,), (0,), (7,), (2, 0, 4), (1, 1, 1, 1, 5), (2, 1, 3, 1, 2, 4))


@each_dtype((torch.float32, torch.float64, torch.bfloat16))
@each(REPRESENTATIVE)
def test_r16_edge_sizes(case: Case, dtype: torch.dtype, device: str) -> None:
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for shape in EDGE_SHAPES:
        tensors = case.arguments(shape, dtype, device=device)
        found = differentiate(case, tensors)
        assert_same(found, differentiate(case.reference, tensors), rtol=tolerance, atol=10 * tolerance)


@each([case for case in FULLEST if case.op.endswith("_tangent")])
def test_r16_no_tangents(case: Case, device: str) -> None:
    tensors = case.arguments((3, 5), device=device)
    tensors["z_dot"] = tensors["z_dot"][:0]
    assert_same(differentiate(case, tensors), differentiate(case.reference, tensors))


@each([case for case in FULLEST if case.op.startswith("linear_")])
def test_r16_no_output_features(case: Case, device: str) -> None:
    tensors = case.arguments((3, 5), device=device)
    tensors["weight"], tensors["bias"] = tensors["weight"][:0], tensors["bias"][:0]
    if "coeffs" in tensors:
        tensors["coeffs"] = tensors["coeffs"][:, :0]
    found = differentiate(case, tensors)
    assert found[0].shape == (3, 0)
    assert torch.equal(found[1], torch.zeros(3, device=device))


# ---- R17: autocast --------------------------------------------------------------------------------------------------


@each_dtype((torch.bfloat16, torch.float16))
@each(REPRESENTATIVE)
def test_r17_autocast(case: Case, dtype: torch.dtype, device: str) -> None:
    tensors = case.arguments((4, 8), device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        results = case(tensors)
        product = torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
        expected = product.dtype if is_linear(case) else torch.float32
    assert expected == (dtype if is_linear(case) else torch.float32)
    for name, result in zip(case.outputs, results, strict=True):
        assert result.dtype == (torch.float32 if name.endswith("_sq") else expected)
    sum(result.float().sum() for result in results).backward()
    for name, value in tensors.items():
        assert value.grad is not None or (name == "bias" and case.constants.get("kind") == "relu")
        assert value.grad is None or value.grad.dtype == torch.float32
    if not is_linear(case):  # a pointwise op computes in float32 anyway: autocast changes nothing
        assert_bitwise(results, case(tensors))


@each([case for case in FULLEST if not is_linear(case)])
def test_r17_half_precision_data_stays_half_precision_under_autocast(case: Case, device: str) -> None:
    tensors = case.arguments((4, 8), torch.bfloat16, parameter_dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = differentiate(case, tensors)
    assert_bitwise(found, differentiate(case, tensors))


# ---- R20: every element is written ---------------------------------------------------------------------------------


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every buffer that PyTorch hands out without contents is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("shape", [(5, 37), (2, 3, 8), (1300, 3), (3, 1000), (3, 0), (0, 4), (1, 1)], ids=str)
@each(REPRESENTATIVE)
def test_r20_every_element_is_written(case: Case, shape: tuple[int, ...], device: str, poisoned_memory: None) -> None:
    tensors = case.arguments(shape, device=device)
    for value in differentiate(case, tensors):
        assert value.isfinite().all()


@pytest.mark.parametrize("shape", LARGE, ids=str)
@each([case for case in FULLEST if not is_linear(case)])
def test_r20_every_element_of_large_tensors_is_written(
    case: Case, shape: tuple[int, int], device: str, poisoned_memory: None
) -> None:
    for value in differentiate(case, case.arguments(shape, device=device)):
        assert value.isfinite().all()


@pytest.mark.parametrize("arrange", [layout.arrange for layout in ARRANGED], ids=lambda arrange: arrange.__name__)
@each(FULLEST)
def test_r20_nothing_outside_the_tensor_is_read(
    case: Case, arrange: Arrangement, device: str, poisoned_memory: None
) -> None:
    # The memory around a sliced or misaligned tensor is NaN.
    for value in differentiate(case, case.arguments((3, 4, 21), arrange=arrange, device=device)):
        assert value.isfinite().all()


# ---- threads ------------------------------------------------------------------------------------------------------


def _in_threads(*bodies: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_choose_their_backends_independently(device: str, target: tuple[str, str], compiled: bool) -> None:
    case = FULLEST[-1]
    tensors = case.arguments((64, 33), device=device)
    expected = {"reference": differentiate(case.reference, tensors), "auto": differentiate(case, tensors)}
    meeting = threading.Barrier(2)

    def body(name: str) -> Callable[[], None]:
        def run() -> None:
            with ck.backend(name):
                for _ in range(20):
                    meeting.wait(timeout=60)
                    assert_same(differentiate(case, tensors), expected[name], rtol=1e-4, atol=1e-3)
                    served_by = ck.explain(case.op, **tensors, **case.constants).backend
                    assert not compiled or served_by == (name if name == "reference" else target[1])

        return run

    _in_threads(body("reference"), body("auto"))


def test_threads_may_run_the_same_op_at_once(device: str) -> None:
    case = next(case for case in FULLEST if case.op == "polynomial_dreg")
    tensors = case.arguments((1500, 65), device=device)
    expected = differentiate(case, tensors)

    def body() -> None:
        for _ in range(10):
            assert_bitwise(differentiate(case, tensors), expected)

    _in_threads(body, body, body)

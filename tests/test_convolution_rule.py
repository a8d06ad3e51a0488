"""The rule that chooses between the fused convolution and the library's, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import chainzrule_kernels as ck
from chainzrule_kernels import _native_cuda, backends
from chainzrule_kernels.ops import _convolution_rule as rule

A100, H200, RTX = ((8, 0), 108), ((9, 0), 132), ((8, 9), 128)
# A stage of ResNet-50: 3 x 3, 64 channels; enough positions to fill every device.
USUAL = rule.Problem("bfloat16", 32, 64, 64, 1, (56, 56), (3, 3), (1, 1), (1, 1), (1, 1), True)


def test_a_usual_call_is_taken() -> None:
    assert rule.cannot(USUAL) is None
    assert USUAL.out_size == (56, 56)
    assert USUAL.tiles == 32 * 56 * 56 // 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arithmetic": "float64"}, "bfloat16, float16 and float32, and x is float64"),
        ({"groups": 2}, "one group, and there are 2"),
        ({"padding": None}, "the same padding on both sides"),
        ({"channels": 12}, "in bfloat16 it takes a multiple of 8 channels of x, and there are 12"),
        ({"filters": 20}, "in bfloat16 it takes a multiple of 8 filters, and there are 20"),
        (
            {"arithmetic": "tfloat32", "channels": 6},
            "in tfloat32 it takes a multiple of 4 channels of x, and there are 6",
        ),
        (
            {"channels": 0, "arithmetic": "float32"},
            "in float32 it takes a multiple of 1 channels of x, and there are 0",
        ),
        ({"window": (33, 1)}, "windows of at most 32 taps in each direction, and this is 33 x 1"),
        ({"window": (3, 3), "size": (1, 9), "padding": (0, 0)}, "the window does not fit into x of size 1 x 9"),
        ({"size": (1 << 13, 1 << 11)}, "less than 2 GiB"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(rule.cannot(replace(USUAL, **changes)))


def test_float32_takes_any_channels() -> None:
    assert rule.cannot(replace(USUAL, arithmetic="float32", channels=3, filters=5)) is None


def test_where_the_instructions_are_the_fastest_fusing_pays() -> None:
    for device in (A100, RTX):
        assert rule.not_worthwhile(USUAL, *device) is None
        assert rule.not_worthwhile(replace(USUAL, channels=512), *device) is None


def test_on_hopper_the_products_of_an_output_decide() -> None:
    bound = rule.worthwhile_products(rule.CAPABILITIES[9])
    assert bound == 350
    pointwise = replace(USUAL, window=(1, 1), padding=(0, 0))
    assert rule.not_worthwhile(replace(pointwise, channels=344), *H200) is None
    for arithmetic in ("bfloat16", "tfloat32"):
        more = replace(pointwise, arithmetic=arithmetic, channels=352)
        assert "352 products for each output, and beyond 350" in str(rule.not_worthwhile(more, *H200))
    assert "576 products" in str(rule.not_worthwhile(USUAL, *H200))


def test_the_bound_is_where_time_saved_equals_time_lost() -> None:
    hopper = rule.CAPABILITIES[9]
    products = rule.worthwhile_products(hopper)
    # In units of the time in which memory delivers a byte: bfloat16 has 2 bytes, a product 2 operations.
    lost = [2 * count / hopper.operations_for_each_byte * (1 / hopper.share - 1) for count in (products, products + 1)]
    assert lost[0] <= 2 < lost[1]


def test_architectures_without_figures_leave_it_to_the_library() -> None:
    assert "sm_100 has faster tensor-core instructions" in str(rule.not_worthwhile(USUAL, (10, 0), 148))


def test_float32_without_tf32_is_fused_for_single_taps() -> None:
    exact = replace(USUAL, arithmetic="float32")
    assert "Winograd" in str(rule.not_worthwhile(exact, *A100))
    assert rule.not_worthwhile(replace(exact, window=(1, 1), padding=(0, 0)), *H200) is None


def test_a_device_that_would_stay_empty() -> None:
    few = replace(USUAL, batch=1, size=(14, 14))
    assert "2 thread blocks for 108 multiprocessors" in str(rule.not_worthwhile(few, *A100))
    assert rule.not_worthwhile(replace(few, batch=108), *A100) is None


def test_channels_outermost_are_left_to_the_library() -> None:
    assert "channels_last" in str(rule.not_worthwhile(replace(USUAL, channels_innermost=False), *A100))


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("valid", (0, 0)),
        ("same", (2, 2)),
        (1, (1, 1)),
        ((1, 2), (1, 2)),
        (((1, 1), (2, 2)), (1, 2)),
        (((0, 1), (0, 0)), None),
    ],
    ids=str,
)
def test_paddings(padding: Any, expected: tuple[int, int] | None) -> None:
    x, weight = torch.empty(2, 8, 9, 9), torch.empty(16, 8, 3, 3)
    assert rule.problem(x, weight, 1, padding, 2).padding == expected


def test_an_even_window_cannot_be_the_same_on_both_sides() -> None:
    assert rule.problem(torch.empty(2, 8, 9), torch.empty(16, 8, 4), padding="same").padding is None


def test_problem_reads_the_tensors() -> None:
    x = torch.empty(2, 8, 9, 7, dtype=torch.bfloat16)
    weight = torch.empty(16, 4, 3, 2, dtype=torch.bfloat16)
    found = rule.problem(x, weight, (2, 1), (1, 0), 2, 2)
    assert found == rule.Problem("bfloat16", 2, 8, 16, 2, (9, 7), (3, 2), (1, 0), (2, 1), (2, 2), False)
    assert rule.problem(x.to(memory_format=torch.channels_last), weight, (2, 1), (1, 0), 2, 2).channels_innermost
    single = rule.problem(x[0], weight, (2, 1), (1, 0), 2, 2)
    assert (single.batch, single.channels, single.channels_innermost) == (1, 8, False)
    line = torch.empty(3, 10, 8).movedim(-1, 1)
    assert rule.problem(line, torch.empty(16, 8, 3)).channels_innermost


def test_tf32_follows_the_setting_of_pytorch() -> None:
    cudnn = torch.backends.cudnn
    allowed, precision = cudnn.allow_tf32, cudnn.conv.fp32_precision
    try:
        for setting, expected in ((True, "tfloat32"), (False, "float32")):
            cudnn.allow_tf32 = setting
            assert rule.arithmetic(torch.float32) == expected
        for setting, expected in (("tf32", "tfloat32"), ("ieee", "float32")):
            cudnn.conv.fp32_precision = setting
            assert rule.arithmetic(torch.float32) == expected
        # The two settings contradict each other, and the newer one says nothing of convolutions.
        cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = True, "none", "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            _ = cudnn.allow_tf32
        assert rule.arithmetic(torch.float32) == "float32"
    finally:
        cudnn.rnn.fp32_precision = "none"
        cudnn.conv.fp32_precision = precision
        cudnn.allow_tf32 = allowed
    assert rule.arithmetic(torch.float16) == "float16"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("8.0;9.0+PTX", (12, 0), True),
        ("10.0", (10, 3), True),
        ("10.0f", (10, 3), False),
    ],
)
def test_machine_code_runs_where_cuda_says(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert _native_cuda.built_for(architectures, capability) == runs


def test_why_not_cuda_names_the_device_first() -> None:
    x = torch.empty(2, 8, 9, 9)
    for op in _native_cuda.OPS:
        assert backends.why_not("cuda", op, x) == "it serves CUDA tensors, and this one is on cpu"
    assert backends.why_not("cuda", "polynomial", x) == "this version has no cuda kernel for polynomial"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """An A100 with the compiled module, as far as the choice of a backend asks; its tensors lie on meta."""
    monkeypatch.setattr(_native_cuda, "cuda", type("module", (), {"built_for": lambda: {"architectures": "8.0"}}))
    monkeypatch.setattr(_native_cuda, "device_properties", lambda device: (8, 0, 108))
    monkeypatch.setattr(_native_cuda, "DEVICE_TYPE", "meta")
    # Of a device without autocast PyTorch does not say whether it is on.
    monkeypatch.setattr(rule, "dtype_of_convolution", lambda x: x.dtype)
    return torch.empty(32, 64, 56, 56, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)


def test_choose_asks_both_questions(pretended: torch.Tensor) -> None:
    weight = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="meta")
    coeffs = torch.empty(4, device="meta")
    rest = (weight, None, coeffs, 1, 1, 1, 1)
    assert backends.choose("polynomial_conv2d", pretended, *rest) == "cuda"
    # What is not worthwhile is not chosen where another backend is able, and served when it is asked for.
    assert "channels_last" in str(backends.slower("cuda", "polynomial_conv2d", pretended.contiguous(), *rest))
    with ck.backend("cuda"):
        assert backends.choose("polynomial_conv2d", pretended.contiguous(), *rest) == "cuda"
        with pytest.raises(RuntimeError, match="one group, and there are 2"):
            backends.choose("polynomial_conv2d", pretended, weight[:, :32], None, coeffs, 1, 1, 1, 2)


@pytest.mark.usefixtures("pretended")
def test_r04_the_choice_can_be_traced_and_holds_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native_cuda, "DEVICE_TYPE", "cpu")
    weight, coeffs = torch.empty(64, 64, 3, 3), torch.empty(4)

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def chosen(x: torch.Tensor, groups: int) -> torch.Tensor:
        call = (weight, None, coeffs, 1, "same", 1, groups)
        able = backends.why_not("cuda", "polynomial_conv2d", x, *call) is None
        pays = able and backends.slower("cuda", "polynomial_conv2d", x, *call) is None
        return x.sum(0) + (2 if pays else 1 if able else 0)

    def maps(batch: int) -> torch.Tensor:
        return torch.zeros(batch, 64, 14, 14).to(memory_format=torch.channels_last)

    with torch._dynamo.config.patch(error_on_recompile=True):
        # Two samples would not fill the device, which is not asked here.
        for batch in (2, 200, 9):
            assert chosen(maps(batch), 1).unique().item() == 2
    assert chosen(maps(2).contiguous(), 1).unique().item() == 1
    assert chosen(maps(2), 2).unique().item() == 0


def test_a_module_for_other_architectures_is_named(pretended: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native_cuda, "device_properties", lambda device: (9, 0, 132))
    reason = backends.why_not("cuda", "polynomial_conv2d", pretended)
    assert reason == "the compiled CUDA module is built for 8.0, and meta is 9.0"

"""The kernels on a GPU against the promises for one: ``python -m bench.gpu``, or ``make gpu`` for everything.

Times are those of CUDA graphs: each graph holds one call for every set of inputs, with sets enough that three times
the L2 cache lies between two uses of one, and is replayed until the median stands. Every provider shows first that
its results are right. The whole is measured twice, one run after the other, and the larger difference of the two is
printed as the spread.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import chainzrule_kernels as ck
from bench import record, workloads
from bench.peers import LIGER_POLY_NORM, LIGER_RELU_SQUARED, TORCHORTHO_HERMITE, Peer
from chainzrule_kernels.ops import _launch

REPLAYS = 20
CALLS = 1000
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference from float64, relative to the largest value, that counts as the right answer."""


@dataclass(frozen=True)
class Work:
    """An op on one shape.

    Attributes:
        op: the public function.
        label: which arguments.
        shape: of ``z``, or of ``x`` for a linear op; four sizes are feature maps, laid out with the channels innermost.
        dtype: of the data.
        rest: from the shape to the other arguments, tensors in float64.
        is_data: of these, whether it follows the data's dtype.
        streams: tensors as large as ``z`` that a forward and a backward must move.
        compare: the providers beside the fused kernels.
        form: from the op to what is measured, where that is not the op on these arguments as they are.
        peers: functions of other libraries that do the nearest job.
    """

    op: str
    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rest: Callable[[tuple[int, ...]], Sequence[Any]]
    is_data: tuple[bool, ...]
    streams: tuple[int, int]
    compare: tuple[str, ...] = ("copy", "eager", "compile", "compile cooperative")
    form: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    peers: tuple[Peer, ...] = ()

    @property
    def fused(self) -> Callable[..., Any]:
        """The public function."""
        function = getattr(ck, self.op)
        return function if self.form is None else self.form(function)

    @property
    def reference(self) -> Callable[..., Any]:
        """The definition in plain PyTorch."""
        definition = getattr(ck.reference, self.op)
        return definition if self.form is None else self.form(definition)

    @property
    def name(self) -> str:
        """For the table."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}, {self.label}, {'x'.join(map(str, self.shape))} {dtype}"


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def _linear(features: int) -> Callable[[tuple[int, ...]], Sequence[Any]]:
    """Weight, bias and coefficients of a layer with so many outputs."""
    return lambda s: [_normal(features, s[1]) / s[1] ** 0.5, _normal(features), _cubic(None)]


def _cubic(columns: int | None) -> Tensor:
    return 0.3 * _normal(4) if columns is None else 0.3 * _normal(4, columns)


MEBI = 1 << 20
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
LINEAR_PROVIDERS = ("F.linear", "two kernels", "one kernel")

WORKS = (
    Work("polynomial_dreg", "shared", (65536, 1024), BFLOAT16, lambda s: [_cubic(None)], (False,), (2, 3)),
    Work(
        "polynomial_dreg",
        "per channel, row_sq",
        (65536, 1024),
        BFLOAT16,
        lambda s: [_cubic(s[1]), _normal(s[1]).square()],
        (False, False),
        (2, 3),
    ),
    Work("polynomial_dreg", "shared", (65536, 1024), FLOAT32, lambda s: [_cubic(None)], (False,), (2, 3)),
    Work(
        "polynomial_dreg", "odd width", (65536, 1023), BFLOAT16, lambda s: [_cubic(None)], (False,), (2, 3), ("copy",)
    ),
    Work(
        "polynomial_dreg",
        "few wide rows",
        (16, 4 * MEBI),
        BFLOAT16,
        lambda s: [_cubic(None)],
        (False,),
        (2, 3),
        ("copy",),
    ),
    Work(
        "polynomial_dreg",
        "many narrow rows",
        (MEBI, 64),
        BFLOAT16,
        lambda s: [_cubic(None)],
        (False,),
        (2, 3),
        ("copy",),
    ),
    Work(
        "polynomial", "shared", (65536, 1024), BFLOAT16, lambda s: [_cubic(None)], (False,), (2, 3), ("copy", "eager")
    ),
    Work(
        "polynomial",
        "shared, PolyNorm",
        (65536, 1024),
        BFLOAT16,
        lambda s: [_cubic(None)],
        (False,),
        (2, 3),
        ("copy",),
        peers=(LIGER_POLY_NORM,),
    ),
    Work(
        "polynomial",
        "relu squared",
        (65536, 1024),
        BFLOAT16,
        lambda s: [],
        (),
        (2, 3),
        ("copy", "eager", "compile"),
        form=partial(workloads.relu_squared_of, device="cuda"),
        peers=(LIGER_RELU_SQUARED,),
    ),
    Work(
        "polynomial",
        "Hermite",
        (16384, 1024),
        BFLOAT16,
        lambda s: [ck.coefficients.hermite_start(3, device="cuda")],
        (False,),
        (2, 3),
        ("copy", "eager", "compile"),
        form=partial(workloads.hermite_of, device="cuda"),
        peers=(TORCHORTHO_HERMITE,),
    ),
    Work(
        "activation_dreg", "gelu", (65536, 1024), BFLOAT16, lambda s: ["gelu"], (), (2, 3), ("copy", "eager", "compile")
    ),
    Work(
        "polynomial_tangent",
        "4 tangents",
        (16384, 1024),
        BFLOAT16,
        lambda s: [_normal(4, *s), _cubic(None)],
        (True, False),
        (10, 15),
        ("copy", "eager", "compile"),
    ),
    Work(
        "linear_polynomial_dreg",
        "4096 to 4096",
        (16384, 4096),
        BFLOAT16,
        _linear(4096),
        (True, True, False),
        (0, 0),
        LINEAR_PROVIDERS,
    ),
    Work(
        "linear_polynomial_dreg",
        "512 to 4096",
        (65536, 512),
        BFLOAT16,
        _linear(4096),
        (True, True, False),
        (0, 0),
        LINEAR_PROVIDERS,
    ),
    Work(
        "polynomial_spatial_dreg",
        "shared, tap_sq",
        (128, 256, 56, 56),
        BFLOAT16,
        lambda s: [_cubic(None), _normal(*s[1:]).square()],
        (False, False),
        (2, 3),
        ("copy", "eager", "compile"),
    ),
    Work(
        "polynomial_spatial_dreg",
        "per channel, tap_sq",
        (128, 256, 56, 56),
        BFLOAT16,
        lambda s: [_cubic(s[1]), _normal(*s[1:]).square()],
        (False, False),
        (2, 3),
        ("copy", "eager", "compile"),
    ),
)


@dataclass(frozen=True)
class ConvolutionWork:
    """A polynomial-kernel convolution on one shape, in channels_last, without gradients.

    Attributes:
        label: which layer.
        x_shape: ``(B, C, H, W)``.
        weight_shape: ``(K, C, R, S)``.
        padding: on every side.
        dtype: of the data.
    """

    label: str
    x_shape: tuple[int, int, int, int]
    weight_shape: tuple[int, int, int, int]
    padding: int
    dtype: torch.dtype = BFLOAT16

    @property
    def name(self) -> str:
        """For the table."""
        return f"polynomial_conv2d, {self.label}, batch {self.x_shape[0]}, {str(self.dtype).removeprefix('torch.')}"


CONVOLUTIONS = (
    ConvolutionWork("3x3, 64 to 64 at 56x56", (256, 64, 56, 56), (64, 64, 3, 3), 1),
    ConvolutionWork("3x3, 128 to 128 at 28x28", (256, 128, 28, 28), (128, 128, 3, 3), 1),
    ConvolutionWork("3x3, 512 to 512 at 7x7", (256, 512, 7, 7), (512, 512, 3, 3), 1),
    ConvolutionWork("1x1, 64 to 256 at 56x56", (256, 64, 56, 56), (256, 64, 1, 1), 0),
    ConvolutionWork("1x1, 256 to 64 at 56x56", (256, 256, 56, 56), (64, 256, 1, 1), 0),
    ConvolutionWork("1x1, 64 to 256 at 56x56", (256, 64, 56, 56), (256, 64, 1, 1), 0, FLOAT32),
)


@dataclass
class Result:
    """What was measured of a piece of work: seconds for each provider in each run, or why there are none."""

    work: str
    stage: str
    bytes: int
    operations: int | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def median(self, provider: str) -> float | None:
        """The mean of the runs' medians."""
        return statistics.mean(self.seconds[provider]) if self.seconds.get(provider) else None

    def ratio(self, numerator: str, denominator: str = "fused") -> float | None:
        """The ratio of two times."""
        a, b = self.median(numerator), self.median(denominator)
        return None if a is None or b is None else a / b

    @property
    def spread(self) -> float | None:
        """How far the runs of the fused kernels lie apart, as a fraction."""
        runs = self.seconds.get("fused", [])
        return (max(runs) - min(runs)) / min(runs) if len(runs) > 1 else None


STAGES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Candidate:
    """A provider with its arguments, and the definition that judges it."""

    name: str
    function: Callable[..., Any]
    definition: Callable[..., Any]
    sets: Sequence[Sequence[Any]]


def _peer(peer: Peer, work: Work, sets: Sequence[Sequence[Any]]) -> Candidate:
    """Another library's function, judged by its own definition where that differs from the work's."""
    if peer.definition is None:
        return Candidate(peer.name, peer.function(), work.reference, sets)
    own = [[value.detach().requires_grad_() for value in peer.arguments_of(arguments[0])] for arguments in sets]
    return Candidate(peer.name, peer.function(), peer.definition, own)


def measure(work: Work, results: dict[tuple[str, str], Result]) -> None:
    """One run of one piece of work, all stages and providers."""
    torch.manual_seed(0)
    # Of the same few functions Dynamo would otherwise keep every shape, and after eight of them compile no more.
    torch._dynamo.reset()
    size = math.prod(work.shape) * work.dtype.itemsize * max(1, work.streams[0] // 2)
    sets = [_arguments(work) for _ in range(_sets_beyond_the_cache(size))]
    candidates = [Candidate(name, function, work.reference, sets) for name, function in _providers(work).items()]
    candidates.append(Candidate("fused", work.fused, work.reference, sets))
    skipped = {}
    for peer in work.peers:
        because = peer.missing_because("cuda")
        if because is None:
            candidates.append(_peer(peer, work, sets))
        else:
            skipped[peer.name] = because
    for stage in STAGES:
        moved = _bytes(work, stage)
        key = work.name, stage
        operations = _operations(work, stage, sets[0])
        result = results.setdefault(key, Result(*key, moved, operations, skipped=skipped))
        if moved and "copy" in work.compare:
            result.seconds.setdefault("copy", []).append(_copy_seconds(moved))
        for one in candidates:
            name = one.name
            try:
                # Right in the forward, or no figure at any stage.
                if stage == "forward":
                    _check(work, one)
                elif name in results[work.name, "forward"].failures:
                    result.failures[name] = results[work.name, "forward"].failures[name]
                    continue
                result.seconds.setdefault(name, []).append(_graph_seconds(one.function, one.sets, stage))
            except Exception as error:
                result.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]


def measure_convolution(work: ConvolutionWork, results: dict[tuple[str, str], Result]) -> None:
    """One run of one convolution: the fused kernel, cuDNN alone, cuDNN and one pass, the published unfold code."""
    torch.manual_seed(0)

    def drawn() -> list[Tensor]:
        x = _normal(*work.x_shape).to(work.dtype, memory_format=torch.channels_last)
        weight = 0.1 * _normal(*work.weight_shape)
        return [x, weight.to(work.dtype, memory_format=torch.channels_last), _cubic(work.weight_shape[0])]

    def served_by(name: str) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, coeffs: Tensor) -> Tensor:
            with ck.backend(name):
                return ck.polynomial_conv2d(x, weight, None, coeffs, 1, work.padding)

        return call

    providers: dict[str, Callable[..., Tensor]] = {
        "fused": served_by("cuda"),
        "F.conv2d": lambda x, weight, coeffs: F.conv2d(x, weight, None, 1, work.padding),
        "F.conv2d and one pass": served_by("triton"),
        "auto": served_by("auto"),
        "unfold": lambda x, weight, coeffs: _unfolded(x, weight, coeffs, work.padding),
    }
    skipped = {}
    if ck._native_cuda.cuda is None:
        skipped["fused"] = str(ck._native_cuda.missing_because)
        del providers["fused"]
    size = math.prod(work.x_shape) * work.dtype.itemsize
    sets = [drawn() for _ in range(_sets_beyond_the_cache(size))]
    first = [value.double() for value in sets[0]]
    with torch.no_grad():
        exact = ck.reference.polynomial_conv2d(first[0][:2], first[1], None, first[2], 1, work.padding)
    operations = 2 * math.prod(work.weight_shape) * work.x_shape[0] * math.prod(work.x_shape[2:])
    key = work.name, "forward"
    result = results.setdefault(key, Result(*key, 0, operations, skipped=skipped))
    for name, provider in providers.items():
        try:
            with torch.no_grad():
                found = provider(*sets[0])[:2]
            error = ((found.double() - exact).abs().max() / exact.abs().max()).item()
            if name != "F.conv2d" and not error <= TOLERANCE[work.dtype]:
                raise AssertionError(f"it differs from float64 by {error:.2g} of the largest value")
            result.seconds.setdefault(name, []).append(_graph_seconds(provider, sets, "forward"))
        except Exception as error:
            result.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]


def _unfolded(x: Tensor, weight: Tensor, coeffs: Tensor, padding: int) -> Tensor:
    """As published: every patch is written out, then a product of matrices, then powers."""
    filters, _, height, width = weight.shape
    patches = F.unfold(x, (height, width), padding=padding)
    s = weight.flatten(1) @ patches
    y = sum(coefficient.to(x.dtype)[:, None] * s**power for power, coefficient in enumerate(coeffs))
    assert isinstance(y, Tensor)
    return y.view(x.shape[0], filters, x.shape[2] + 2 * padding - height + 1, -1)


def _arguments(work: Work) -> list[Any]:
    z = _normal(*work.shape).to(work.dtype)
    if z.dim() == 4:
        z = z.to(memory_format=torch.channels_last)
    z.requires_grad_()
    rest: list[Any] = []
    is_data = iter(work.is_data)
    for value in work.rest(work.shape):
        if isinstance(value, Tensor):
            rest.append(value.to(work.dtype if next(is_data) else torch.float32).requires_grad_())
        else:
            rest.append(value)
    return [z, *rest]


def _providers(work: Work) -> dict[str, Callable[..., Any]]:
    plain = work.reference
    known: dict[str, Callable[[], Callable[..., Any]]] = {
        "eager": lambda: plain,
        "compile": lambda: torch.compile(plain, dynamic=False),
        "compile cooperative": lambda: torch.compile(
            plain, dynamic=False, options={"triton.cooperative_reductions": True}
        ),
        "F.linear": lambda: lambda x, weight, bias, coeffs: F.linear(x, weight, bias),
        "two kernels": lambda: _in_two_kernels,
        "one kernel": lambda: _in_one_kernel,
    }
    return {name: known[name]() for name in work.compare if name in known}


def _in_two_kernels(x: Tensor, weight: Tensor, bias: Tensor, coeffs: Tensor) -> tuple[Tensor, Tensor]:
    """The library's product and a fused pass, whatever the rule says."""
    return ck.polynomial_dreg(F.linear(x, weight, bias), coeffs, weight.float().square().sum(1))


def _in_one_kernel(x: Tensor, weight: Tensor, bias: Tensor, coeffs: Tensor) -> tuple[Tensor, Tensor]:
    """The product with the polynomial in its epilogue, whatever the rule says."""
    assumed = _launch.PRODUCT_EFFICIENCY
    _launch.PRODUCT_EFFICIENCY = 1 - 1e-6
    try:
        return ck.linear_polynomial_dreg(x, weight, bias, coeffs)
    finally:
        _launch.PRODUCT_EFFICIENCY = assumed


def _bytes(work: Work, stage: str) -> int:
    streams = {"forward": work.streams[0], "backward": work.streams[1], "both": sum(work.streams)}[stage]
    return streams * math.prod(work.shape) * work.dtype.itemsize


def _operations(work: Work, stage: str, arguments: Sequence[Any]) -> int | None:
    """Those of the matrix products, for the ops that contain one; the backward has two."""
    if not work.op.startswith("linear_"):
        return None
    x, weight = arguments[:2]
    return {"forward": 2, "backward": 4, "both": 6}[stage] * int(x.shape[0]) * int(weight.numel())


def _sets_beyond_the_cache(size: int) -> int:
    """How many sets of inputs of this many bytes there must be for three times the L2 cache between two uses of one."""
    return max(2, 1 + -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // size))


def _gradients(results: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(result.shape, device="cuda").to(result.dtype) for result in results]


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _leaves(arguments: Sequence[Any]) -> list[Tensor]:
    return [value for value in arguments if isinstance(value, Tensor)]


def _check(work: Work, candidate: Candidate) -> None:
    """Raise unless the first rows' results agree with float64."""
    if candidate.name == "F.linear":
        return
    rows = 64
    first = [value.detach() if isinstance(value, Tensor) else value for value in candidate.sets[0]]
    doubles = [value.double() if isinstance(value, Tensor) else value for value in first]
    doubles[0] = doubles[0][:rows]
    if work.op.endswith("tangent"):
        doubles[1] = doubles[1][:, :rows]
    with torch.no_grad():
        found = _as_tuple(candidate.function(*first))
        exact = _as_tuple(candidate.definition(*doubles))
    for index, (one, other) in enumerate(zip(found, exact, strict=True)):
        per_tangent = work.op.endswith("tangent") and index > 0
        part = one[:, :rows] if per_tangent else one[:rows]
        error = (part.double() - other).abs().max() / other.abs().max()
        if not error <= TOLERANCE[work.dtype]:
            raise AssertionError(f"result {index} differs from float64 by {error:.2g} of its largest value")


def _graph_seconds(function: Callable[..., Any], sets: Sequence[Sequence[Any]], stage: str) -> float:
    """The median time of one call, from replays of a graph that calls once with every set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if stage == "forward":

            def call(index: int) -> Any:
                with torch.no_grad():
                    return function(*sets[index])
        else:
            outputs = [_as_tuple(function(*arguments)) for arguments in sets]
            gradients = [_gradients(results) for results in outputs]
            if stage == "both":
                del outputs

                def call(index: int) -> Any:
                    results = _as_tuple(function(*sets[index]))
                    return torch.autograd.grad(results, _leaves(sets[index]), gradients[index], allow_unused=True)
            else:

                def call(index: int) -> Any:
                    return torch.autograd.grad(
                        outputs[index], _leaves(sets[index]), gradients[index], retain_graph=True, allow_unused=True
                    )

        for index in range(len(sets)):
            call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(len(sets)):
            call(index)
    return _replayed(graph) / len(sets)


def _copy_seconds(moved: int) -> float:
    """A copy that reads and writes this many bytes in all, beyond the cache like everything else."""
    elements = moved // 2
    count = _sets_beyond_the_cache(moved)
    pairs = [
        (
            torch.ones(elements, dtype=torch.uint8, device="cuda"),
            torch.empty(elements, dtype=torch.uint8, device="cuda"),
        )
        for _ in range(count)
    ]
    for source, target in pairs:
        target.copy_(source)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for source, target in pairs:
            target.copy_(source)
    return _replayed(graph) / count


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    """The median time of a replay."""
    times = []
    for _ in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


def call_overhead() -> dict[str, float]:
    """Microseconds that the host spends on a call at 1 x 64, for F.gelu and the ops."""
    z = _normal(1, 64)
    coeffs = _cubic(None)
    calls: dict[str, Callable[[], Any]] = {
        "F.gelu": lambda: F.gelu(z),
        "polynomial": lambda: ck.polynomial(z, coeffs),
        "polynomial_dreg": lambda: ck.polynomial_dreg(z, coeffs),
    }
    overhead = {}
    for name, call in calls.items():
        rounds = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            rounds.append((time.perf_counter() - start) / CALLS * 1e6)
            torch.cuda.synchronize()
        overhead[name] = statistics.median(rounds)
    return overhead


def peak_memory() -> dict[str, int]:
    """The most bytes that a forward and a backward of polynomial_dreg hold beyond the arguments."""
    work = WORKS[0]
    arguments = _arguments(work)
    with torch.no_grad():
        gradients = _gradients(ck.polynomial_dreg(*arguments))
    peaks = {}
    for name, function in (("fused", ck.polynomial_dreg), ("eager", ck.reference.polynomial_dreg)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function(*arguments)
        torch.autograd.grad(results, _leaves(arguments), gradients)
        del results
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    return peaks


Bound = tuple[str, str, float, float | None]


def bounds(results: dict[tuple[str, str], Result], overhead: dict[str, float], peaks: dict[str, int]) -> list[Bound]:
    """The promises: what, ``">="`` or ``"<="``, the limit, and what was measured."""
    main = WORKS[0].name
    linear = next(work.name for work in WORKS if work.label == "4096 to 4096")

    def ratio(work: str, stage: str, numerator: str, denominator: str = "fused") -> float | None:
        result = results.get((work, stage))
        return None if result is None else result.ratio(numerator, denominator)

    return [
        ("forward: a copy takes this part of its time", ">=", 0.97, ratio(main, "forward", "copy")),
        ("backward, all gradients: a copy takes this part of its time", ">=", 0.95, ratio(main, "backward", "copy")),
        ("forward + backward: faster than eager", ">=", 8.0, ratio(main, "both", "eager")),
        ("forward + backward: faster than torch.compile", ">=", 1.5, ratio(main, "both", "compile")),
        (
            "the same with cooperative reductions",
            ">=",
            1.5,
            ratio(main, "both", "compile cooperative"),
        ),
        ("linear_polynomial_dreg over F.linear", "<=", 1.05, ratio(linear, "forward", "fused", "F.linear")),
        *(
            (f"{what} over F.conv2d", "<=", 1.05, ratio(what, "forward", "auto", "F.conv2d"))
            for what in (work.name for work in CONVOLUTIONS)
        ),
        (
            "polynomial_conv2d: faster than the published unfold code",
            ">=",
            20.0,
            ratio(CONVOLUTIONS[0].name, "forward", "unfold", "auto"),
        ),
        ("a call at 1x64 over F.gelu, in us", "<=", 10.0, overhead["polynomial_dreg"] - overhead["F.gelu"]),
        ("peak memory over eager", "<=", 0.35, peaks["fused"] / peaks["eager"]),
    ]


def machine() -> dict[str, Any]:
    """The machine around it, the GPU and the software under it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        **record.machine(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "system": platform.platform(),
    }


def _driver() -> str:
    try:
        finished = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return finished.stdout.split("\n")[0].strip()


def as_json(
    results: dict[tuple[str, str], Result],
    overhead: dict[str, float],
    peaks: dict[str, int],
    copied: float,
    quick: bool = False,
) -> dict[str, Any]:
    """Everything about a run."""
    import triton

    return {
        "date": record.now(),
        "machine": machine(),
        "versions": {**record.versions(), "triton": triton.__version__},
        "quick": quick,
        "copy_gigabytes_per_second": copied,
        "bounds": [
            {"what": what, "sense": sense, "limit": limit, "measured": measured}
            for what, sense, limit, measured in bounds(results, overhead, peaks)
        ],
        "call_overhead_us": overhead,
        "peak_bytes": peaks,
        "results": [
            {
                **asdict(result),
                "gigabytes_per_second": _rate(result),
                "of_copy": result.ratio("copy"),
                "spread": result.spread,
            }
            for result in results.values()
        ],
        "errors": {},
    }


def _is_met(sense: str, limit: float, measured: float) -> bool:
    return measured >= limit if sense == ">=" else measured <= limit


def _rate(result: Result) -> float | None:
    seconds = result.median("fused")
    return result.bytes / seconds / 1e9 if seconds and result.bytes else None


def print_results(results: dict[tuple[str, str], Result], overhead: dict[str, float], peaks: dict[str, int]) -> None:
    """What was measured, and a short table of the promises last."""
    print(f"{'work':<66}{'stage':<10}{'us':>9}{'GB/s':>8}{'of copy':>9}{'spread':>8}  others, times the fused time")
    for result in results.values():
        seconds, rate, of_copy, spread = result.median("fused"), _rate(result), result.ratio("copy"), result.spread
        compared = [name for name in result.seconds if name not in ("fused", "copy")]
        others = [f"{name} {_cell(result.ratio(name), 1, '.2f')}" for name in compared]
        print(
            f"{result.work:<66}{result.stage:<10}{_cell(seconds, 1e6, '.1f'):>9}{_cell(rate, 1, '.0f'):>8}"
            f"{_cell(of_copy, 100, '.1f', '%'):>9}{_cell(spread, 100, '.1f', '%'):>8}  {', '.join(others)}"
        )
        for name, reason in result.failures.items():
            print(f"    {name}: FAILED, no figure: {reason}")
    print()
    print(f"{'bound':<66}{'limit':>10}{'measured':>12}")
    for what, sense, limit, measured in bounds(results, overhead, peaks):
        verdict = "" if measured is None else "met" if _is_met(sense, limit, measured) else "MISSED"
        print(f"{what:<66}{f'{sense} {limit:g}':>10}{_cell(measured, 1, '.3g'):>12}  {verdict}")


def _cell(value: float | None, factor: float, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value * factor:{form}}{unit}"


def names() -> list[str]:
    """Each piece of work that is measured; a name begins with the op."""
    return [work.name for work in (*WORKS, *CONVOLUTIONS)]


@dataclass
class Measured:
    """Everything that a run has measured."""

    results: dict[tuple[str, str], Result]
    overhead: dict[str, float]
    peaks: dict[str, int]
    copied: float
    quick: bool

    def as_json(self) -> dict[str, Any]:
        """As :func:`as_json`."""
        return as_json(self.results, self.overhead, self.peaks, self.copied, self.quick)


def run(chosen: Callable[[str], bool], repetitions: int = 2, quick: bool = False) -> Measured:
    """Measure.

    Args:
        chosen: from the name of a piece of work, which begins with its op, to whether to measure it.
        repetitions: of the whole, one after the other.
        quick: whether to take an eighth of the rows and images, to see that everything runs.
    """
    # Compiled backwards are called several times on one graph, which forbids them to reuse its memory.
    torch._functorch.config.donated_buffer = False
    results: dict[tuple[str, str], Result] = {}
    for repetition in range(repetitions):
        for work in (work for work in WORKS if chosen(work.name)):
            print(f"run {repetition + 1}: {work.name}", file=sys.stderr)
            rows = max(16, work.shape[0] // 8) if quick else work.shape[0]
            measure(replace(work, shape=(rows, *work.shape[1:])), results)
            torch.cuda.empty_cache()
        for convolution in (work for work in CONVOLUTIONS if chosen(work.name)):
            print(f"run {repetition + 1}: {convolution.name}", file=sys.stderr)
            images = convolution.x_shape[0] // 8 if quick else convolution.x_shape[0]
            measure_convolution(replace(convolution, x_shape=(images, *convolution.x_shape[1:])), results)
            torch.cuda.empty_cache()
    overhead, peaks = call_overhead(), peak_memory()
    gibibyte = 1 << 30
    copied = 2 * gibibyte / _copy_seconds(2 * gibibyte) / 1e9
    return Measured(results, overhead, peaks, copied, quick)


def main() -> int:
    """Measure everything twice, print it and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", default=str(Path(__file__).parent / "results"), help="where the JSON file goes")
    parser.add_argument("--only", default="", help="only works whose name contains this; nothing is written")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: PyTorch sees no GPU", file=sys.stderr)
        return 2
    measured = run(lambda name: arguments.only in name)
    if not arguments.only:
        print(f"written to {record.write(measured.as_json(), Path(arguments.results))}")
    print_results(measured.results, measured.overhead, measured.peaks)
    return 1 if any(result.failures.get("fused") for result in measured.results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Who computes a workload: eager PyTorch, torch.compile, the fused kernels; and a copy of as many bytes beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.peers import Peer
from bench.workloads import Workload

STAGES = ("forward", "backward", "both")
"""A forward without gradients; the backward alone; a forward that saves what the backward needs, and the backward."""

COPIES = ("copy", "copy into a new buffer")
"""The providers that compute nothing."""

SWEEP_STAGES = ("forward", "backward")
"""What is measured at each point of a sweep."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-10}
"""Largest difference from float64, relative to the largest value, that still counts as the right answer.

Wide enough for every right one; rounding errors are judged by ``python -m chainzrule_kernels validate``.
"""


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    Attributes:
        name: ``"eager"``, ``"compile"``, ``"fused"``, ``"copy"``, ….
        run: the timed part; takes what ``prepare`` returned.
        prepare: the untimed part, before each run.
        check: takes what ``run`` returned; says what is wrong with it, or None.
        missing_because: why it cannot be measured, where it cannot; nothing is called then.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    check: Callable[[Any], str | None] = lambda result: None
    missing_because: str | None = None


def missing(name: str, because: str) -> Provider:
    """A provider that is not measured, for a reason."""
    return Provider(name, lambda _: None, missing_because=because)


def providers_of(workload: Workload, stage: str) -> list[Provider]:
    """Everything that a workload is compared with, the fused kernels last."""
    exact = output_and_gradients(workload.reference, workload.in_float64(), stage)
    return [
        *copies(workload, stage),
        *_matrix_product(workload, stage),
        *(_peer(peer, workload, stage, exact) for peer in workload.peers),
        provider("eager", workload.reference, workload, stage, exact),
        compile_provider(workload.reference, workload, stage, exact),
        provider("fused", workload.fused, workload, stage, exact),
    ]


def copies(workload: Workload, stage: str) -> list[Provider]:
    """A copy that moves the bytes of the floor, into a buffer that is ready and into one that it must allocate."""
    source = torch.ones(workload.bytes_at(stage) // 2 // 4)
    target = torch.empty_like(source)
    in_place, allocating = COPIES
    return [Provider(in_place, lambda _: target.copy_(source)), Provider(allocating, lambda _: source.clone())]


def _matrix_product(workload: Workload, stage: str) -> list[Provider]:
    """``F.linear`` alone, for the ops that contain it."""
    if not workload.op.startswith("linear_"):
        return []

    def linear(x: Tensor, weight: Tensor, bias: Tensor, function: Any) -> Tensor:
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    alone = replace(workload, gradients=workload.gradients[:1])
    exact = output_and_gradients(linear, alone.in_float64(), stage)
    return [provider("F.linear", linear, alone, stage, exact)]


def _peer(peer: Peer, workload: Workload, stage: str, exact: Sequence[Tensor | None]) -> Provider:
    """Another library's function, judged by its own definition where that differs from the workload's."""
    because = peer.missing_because()
    if because is not None:
        return missing(peer.name, because)
    if peer.definition is not None:
        workload = replace(workload, arguments=peer.arguments_of(workload.arguments[0]))
        exact = output_and_gradients(peer.definition, workload.in_float64(), stage)
    return provider(peer.name, peer.function(), workload, stage, exact)


def compile_provider(
    function: Callable[..., Any], workload: Workload, stage: str, exact: Sequence[Tensor | None]
) -> Provider:
    """``torch.compile`` of a function, but for the points of a sweep: compiling takes longer than measuring."""
    if workload.sweep is not None:
        return missing("compile", "not compiled anew for each point of a sweep")
    if not workload.compiled:
        return missing("compile", f"compiled for other arguments of {workload.op} only, to save time")
    return provider("compile", compiled(function, workload), workload, stage, exact)


def provider(
    name: str, function: Callable[..., Any], workload: Workload, stage: str, exact: Sequence[Tensor | None]
) -> Provider:
    """A function of the workload's arguments at one stage; ``exact`` is what its run must return."""
    tolerance = TOLERANCE[workload.arguments[0].dtype]

    def check(results: Any) -> str | None:
        return disagreement(results, exact, tolerance)

    if stage == "forward":
        return Provider(name, lambda _: _tuple(function(*workload.arguments)), check=check)
    arguments, leaves = _with_gradients(workload)

    def forward() -> tuple[Tensor, ...]:
        return _tuple(function(*arguments))

    def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(outputs, leaves, workload.gradients, allow_unused=True)

    if stage == "backward":
        return Provider(name, backward, prepare=forward, check=check)
    return Provider(name, lambda _: backward(forward()), check=check)


def disagreement(results: Any, exact: Sequence[Tensor | None], tolerance: float) -> str | None:
    """What is wrong with the results, or None."""
    for position, (result, right) in enumerate(zip(results, exact, strict=True)):
        if right is None or result is None:
            if result is not right:
                return f"result {position} is missing"
            continue
        scale = right.abs().max().item()
        error = (result.double() - right).abs().max().item()
        # Written so that NaN fails.
        if not error <= tolerance * scale:
            return f"result {position} is off by {error:.3g}, where values reach {scale:.3g}"
    return None


_latest_compiled: tuple[tuple[str, str], Callable[..., Any]] | None = None


def compiled(function: Callable[..., Any], workload: Workload) -> Callable[..., Any]:
    """torch.compile of a function for these very shapes, shared by the stages of one workload."""
    global _latest_compiled
    key = (workload.op, workload.label)
    if _latest_compiled is None or _latest_compiled[0] != key:
        torch.compiler.reset()
        _latest_compiled = (key, torch.compile(function, dynamic=False))
    return _latest_compiled[1]


def output_and_gradients(function: Callable[..., Any], workload: Workload, stage: str) -> list[Tensor | None]:
    """What a provider's ``run`` should return: the outputs of a forward, or the gradients of the arguments."""
    if stage == "forward":
        return [output.detach() for output in _tuple(function(*workload.arguments))]
    arguments, leaves = _with_gradients(workload)
    outputs = _tuple(function(*arguments))
    return list(torch.autograd.grad(outputs, leaves, workload.gradients, allow_unused=True))


def _with_gradients(workload: Workload) -> tuple[list[Any], list[Tensor]]:
    """The arguments as leaves of their own, and the tensors among them."""
    arguments = [
        value.detach().requires_grad_() if isinstance(value, Tensor) else value for value in workload.arguments
    ]
    return arguments, [value for value in arguments if isinstance(value, Tensor)]


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)

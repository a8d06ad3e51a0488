"""Choosing a backend, and asking which one serves."""

from __future__ import annotations

import threading

import pytest
import torch
from shared import FULLEST, Recorder, each

import chainzrule_kernels as ck
from chainzrule_kernels import _native, _native_cuda, backends
from chainzrule_kernels.testing.cases import Case

Z, COEFFS = torch.ones(2, 3), torch.ones(4)
NATIVE = pytest.mark.skipif(_native.cpu is None, reason=f"no native CPU module: {_native.missing_because}")


def _served() -> str:
    return ck.explain("polynomial", Z, COEFFS).backend


def test_an_unknown_backend_is_refused() -> None:
    expected = "backend: expected one of reference, cpu, triton, cuda or auto, got 'gpu'"
    with pytest.raises(ValueError, match=expected), ck.backend("gpu"):
        raise AssertionError("the block must not be entered")


@each(FULLEST)
def test_a_backend_that_cannot_serve_raises_with_the_reason(case: Case) -> None:
    tensors = case.arguments((2, 3))
    for name in ("triton", "cuda"):
        with (
            ck.backend(name),
            pytest.raises(RuntimeError, match=f"{case.op}: the backend '{name}' was asked for") as caught,
        ):
            case(tensors)
        assert backends.why_not(name, case.op, next(iter(tensors.values()))) in str(caught.value)


def test_the_cpu_backend_refuses_tensors_that_lie_elsewhere() -> None:
    z = torch.ones(2, 3, device="meta")
    with ck.backend("cpu"), pytest.raises(RuntimeError, match="it serves CPU tensors, and this one is on meta"):
        ck.polynomial(z, torch.ones(4, device="meta"))


@each(FULLEST)
def test_reference_is_differentiated_by_pytorch_itself(case: Case) -> None:
    tensors = case.arguments((2, 3), requires_grad=True)
    with ck.backend("reference"), Recorder() as recorder:
        case(tensors)[0].sum().backward()
    assert recorder.own_calls == []
    assert recorder.calls


@NATIVE
@each(FULLEST)
def test_auto_prefers_the_native_kernels(case: Case) -> None:
    tensors = case.arguments((2, 3), requires_grad=True)
    assert ck.explain(case.op, **tensors, **case.constants).backend == "cpu"
    with Recorder() as recorder:
        case(tensors)[0].sum().backward()
    # That of the squared weights belongs to a room of its own.
    names = [operator._schema.name.split("::")[1] for operator, _, _ in recorder.own_calls]
    assert len([name for name in names if not name.startswith("squared_taps")]) == 2


def test_blocks_nest_and_end() -> None:
    outside = _served()
    with ck.backend("reference"):
        assert _served() == "reference"
        with ck.backend("auto"):
            assert _served() == outside
        assert _served() == "reference"
    assert _served() == outside


def test_a_block_ends_with_an_exception() -> None:
    outside = _served()
    with pytest.raises(KeyError), ck.backend("reference"):
        raise KeyError
    assert _served() == outside


def test_the_choice_is_local_to_the_thread() -> None:
    outside = _served()
    seen = []
    with ck.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_served()))
        thread.start()
        thread.join()
    assert seen == [outside]


@each(FULLEST)
def test_explain_gives_a_reason_for_every_other_backend(case: Case) -> None:
    explanation = ck.explain(case.op, **case.arguments((2, 3)), **case.constants)
    assert explanation.op == case.op
    assert {explanation.backend, *explanation.reasons} == set(backends.BACKENDS)
    assert explanation.backend not in explanation.reasons
    elsewhere = "it serves CUDA tensors, and this one is on cpu"
    of_cuda = elsewhere if case.op in _native_cuda.OPS else f"this version has no cuda kernel for {case.op}"
    assert explanation.reasons["cuda"] == of_cuda
    assert explanation.reasons["triton"] == elsewhere
    lines = str(explanation).splitlines()
    assert lines[0] == f"{case.op}: served by {explanation.backend}"
    assert len(lines) == len(backends.BACKENDS)


def test_explain_says_that_a_backend_was_asked_for() -> None:
    with ck.backend("reference"):
        explanation = ck.explain("polynomial", Z, COEFFS)
    assert explanation.backend == "reference"
    assert "cpu" in explanation.reasons
    if _native.cpu is not None:
        assert explanation.reasons["cpu"] == "it could, but reference was asked for"


def test_explain_says_why_there_is_no_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "missing_because", "no compiler")
    explanation = ck.explain("polynomial", Z, COEFFS)
    assert explanation.backend == "reference"
    assert explanation.reasons["cpu"] == "no compiler"
    with ck.backend("cpu"), pytest.raises(RuntimeError, match="no compiler"):
        ck.polynomial(Z, COEFFS)


def test_explain_runs_no_kernel() -> None:
    with Recorder() as recorder:
        ck.explain("polynomial_dreg", Z, COEFFS)
    assert recorder.calls == []


def test_explain_refuses_what_is_no_op() -> None:
    with pytest.raises(ValueError, match=r"op: expected one of polynomial, .*, got 'softmax'"):
        ck.explain("softmax", Z)
    with pytest.raises(TypeError, match="missing a required argument: 'coeffs'"):
        ck.explain("polynomial", Z)


@NATIVE
def test_the_native_module_says_what_it_is() -> None:
    assert _native.cpu is not None
    built_for = _native.cpu.built_for()
    assert _native.cpu.instruction_set() in built_for["instruction_sets"].split(", ")
    assert built_for["compiler"]

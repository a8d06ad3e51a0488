"""python -m chainzrule_kernels info and validate."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import chainzrule_kernels as ck
from chainzrule_kernels import _native, backends
from chainzrule_kernels.cli import OUTPUT_CLOSED, main, output
from chainzrule_kernels.ops import PUBLIC_OPS
from chainzrule_kernels.testing.cases import CASES


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chainzrule_kernels", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_info_as_json() -> None:
    finished = _run("info", "--json")
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["versions"]["chainzrule_kernels"] == ck.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["ops"]["cpu"]) == set(PUBLIC_OPS)
    for served in found["ops"]["cpu"].values():
        assert {served["backend"], *served["not"]} == set(backends.BACKENDS)
    assert found["native"]["present"] is (_native.cpu is not None)
    if _native.cpu is not None:
        assert found["native"]["instruction_set"] == _native.cpu.instruction_set()


def test_info_without_the_native_module() -> None:
    finished = _run("info", CHAINZRULE_KERNELS_NO_NATIVE="1")
    assert finished.returncode == 0, finished.stderr
    assert "native CPU module: none; switched off by the environment variable" in finished.stdout
    assert "served by" in finished.stdout


def test_info_is_plain_text_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"chainzrule_kernels {ck.__version__}" in printed
    assert printed.isascii()
    for op in PUBLIC_OPS:
        assert op in printed


@pytest.mark.parametrize(
    "arguments", [["--help"], ["info", "--help"], ["validate", "--help"], ["demo", "--help"], ["bench", "--help"]]
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: python -m chainzrule_kernels" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["validate", "--backend", "gpu"], ["validate", "--op", "gpu"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def _validated(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["validate", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_a_reader_that_stops_reading() -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "chainzrule_kernels", "info", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == OUTPUT_CLOSED


def test_validate_as_json() -> None:
    finished = _run("validate", "--quick", "--json")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads(finished.stdout)
    assert found["passed"] is True
    assert found["failures"] == 0
    assert found["checks"] == len(found["records"])
    seen = {(record["op"], record["backend"], record["dtype"]) for record in found["records"]}
    available = [name for name in backends.BACKENDS if backends.why_not(name, "polynomial", torch.ones(1)) is None]
    dtypes = ("float32", "float64", "bfloat16", "float16")
    assert seen == {(op, backend, dtype) for op in PUBLIC_OPS for backend in available for dtype in dtypes}
    assert {"d z", "d coeffs", "d row_sq", "d weight", "jac_sq"} <= {record["quantity"] for record in found["records"]}


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_validate_on_every_instruction_set(instruction_set: str) -> None:
    if _native.cpu is None:
        pytest.skip(f"no native CPU module: {_native.missing_because}")
    if instruction_set == _native.cpu.instruction_set():
        pytest.skip("test_validate_as_json runs on it")
    finished = _run(
        "validate", "--quick", "--json", "--backend", "cpu", CHAINZRULE_KERNELS_INSTRUCTION_SET=instruction_set
    )
    if "expected one of" in finished.stderr:
        pytest.skip(f"this CPU has no {instruction_set}")
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr
    assert json.loads(finished.stdout)["passed"] is True


def test_validate_every_form_of_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = _validated(capsys, "--backend", "reference", "--op", "polynomial", "--op", "activation_tangent")
    assert status == 0
    asked = {(case.op, case.form) for case in CASES if case.op in ("polynomial", "activation_tangent")}
    assert {(record["op"], record["form"]) for record in found["records"]} == asked


def test_validate_fails_on_a_wrong_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = PUBLIC_OPS["polynomial"]

    def wrong(z: torch.Tensor, coeffs: torch.Tensor) -> torch.Tensor:
        return right.function(z, coeffs) * 1.01

    monkeypatch.setitem(PUBLIC_OPS, "polynomial", dataclasses.replace(right, function=wrong))
    status, found = _validated(capsys, "--quick", "--backend", "reference")
    assert status == 1
    assert found["passed"] is False
    assert found["failures"] > 0
    assert {record["op"] for record in found["records"] if not record["passed"]} == {"polynomial"}
    assert main(["validate", "--quick", "--backend", "reference"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED polynomial[degree 3, shared], reference, float32, contiguous: y: error" in printed


def test_validate_fails_on_a_kernel_that_raises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(z: torch.Tensor, coeffs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")

    broken_op = dataclasses.replace(PUBLIC_OPS["polynomial"], function=broken)
    monkeypatch.setitem(PUBLIC_OPS, "polynomial", broken_op)
    status, found = _validated(capsys, "--quick", "--backend", "reference")
    assert status == 1
    raised = {record["raised"] for record in found["records"] if not record["passed"]}
    assert raised == {"RuntimeError: out of order"}


def test_validate_refuses_a_backend_that_is_not_available(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--backend", "triton"]) == 2
    assert "the backend triton is not available: it serves CUDA tensors" in capsys.readouterr().err


def test_validate_refuses_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--device", "nonsense"]) == 2
    assert "validate: " in capsys.readouterr().err


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table("Title", ["first", "second"], [["a", "b"], ["longer than it", "d"]])
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "  first           second",
        "  a               b",
        "  longer than it  d",
    ]
    assert list(output.with_progress([1, 2, 3], "Counting", quiet=False)) == [1, 2, 3]

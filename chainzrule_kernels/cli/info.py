"""Versions, the native module and its instruction set, devices, and which backend serves each op and why."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import chainzrule_kernels
from chainzrule_kernels import _native, _native_cuda, backends
from chainzrule_kernels.cli.output import print_table
from chainzrule_kernels.testing.cases import CASES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``info``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what is installed and what would run. Always succeeds."""
    found = gather()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def gather() -> dict[str, Any]:
    """Everything that ``info`` prints, fit for JSON."""
    return {
        "versions": {
            "chainzrule_kernels": chainzrule_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version_of("triton"),
        },
        "native": _native_module(),
        "native_cuda": _native_cuda_module(),
        "devices": backends.device_summary(),
        "ops": {device: _served_by(device) for device in _device_types()},
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _native_module() -> dict[str, Any]:
    if _native.cpu is None:
        return {"present": False, "missing_because": _native.missing_because}
    return {
        "present": True,
        "file": _native.cpu.__file__,
        "instruction_set": _native.cpu.instruction_set(),
        "built_for": _native.cpu.built_for(),
    }


def _native_cuda_module() -> dict[str, Any]:
    if _native_cuda.cuda is None:
        return {"present": False, "missing_because": _native_cuda.missing_because}
    return {"present": True, "file": _native_cuda.cuda.__file__, "built_for": _native_cuda.cuda.built_for()}


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _served_by(device: str) -> dict[str, dict[str, Any]]:
    """For each op: the backend that serves it on this device, and why the others do not."""
    served = {}
    for op in ops_in_table():
        case = next(case for case in CASES if case.op == op)
        explanation = backends.explain(op, **case.arguments((2, 3), device=device), **case.constants)
        served[op] = {"backend": explanation.backend, "not": explanation.reasons}
    return served


def ops_in_table() -> list[str]:
    """The names of the public ops, in the order of the table of cases."""
    return list(dict.fromkeys(case.op for case in CASES))


def _print(found: dict[str, Any]) -> None:
    for name, installed in found["versions"].items():
        print(f"{name} {installed or 'not installed'}")
    native = found["native"]
    if native["present"]:
        print(f"native CPU module: runs {native['instruction_set']} ({native['file']})")
        for name, value in native["built_for"].items():
            print(f"  {name.replace('_', ' ')}: {value}")
    else:
        print(f"native CPU module: none; {native['missing_because']}")
    _print_native_cuda(found["native_cuda"])
    print("devices: " + ", ".join(found["devices"]))
    for device, ops in found["ops"].items():
        rows = [[op, served["backend"]] for op, served in ops.items()]
        print_table(f"On {device}", ["op", "served by"], rows)
        for name, op_names in _grouped_reasons(ops).items():
            print(f"  not {name} ({', '.join(op_names)})" if len(op_names) < len(ops) else f"  not {name}")


def _print_native_cuda(native: dict[str, Any]) -> None:
    if not native["present"]:
        print(f"native CUDA module: none; {native['missing_because']}")
        return
    print(f"native CUDA module: {native['file']}")
    for name, value in native["built_for"].items():
        print(f"  {name.replace('_', ' ')}: {value}")


def _grouped_reasons(ops: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """``"backend: reason"`` to the ops that it holds for, so that a reason common to all is printed once."""
    grouped: dict[str, list[str]] = {}
    for op, served in ops.items():
        for name, reason in served["not"].items():
            grouped.setdefault(f"{name}: {reason.replace(op, 'this op')}", []).append(op)
    return grouped

"""Every op on every backend, dtype and layout against the float64 reference: error, allowance, pass.

What an error may be is defined in :mod:`chainzrule_kernels.testing.accuracy`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from chainzrule_kernels import backends
from chainzrule_kernels.cli.output import print_table, with_progress
from chainzrule_kernels.ops import PUBLIC_OPS
from chainzrule_kernels.testing.accuracy import Accuracy, measure
from chainzrule_kernels.testing.cases import CASES, Case
from chainzrule_kernels.testing.layouts import Layout

# The data's dtype and that of the parameters: a model under mixed precision keeps its parameters in float32.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
QUICK_LAYOUTS = ("contiguous", "sliced", "empty batch")

PASSED, FAILED, NOT_AVAILABLE = 0, 1, 2


@dataclass(frozen=True)
class Record:
    """One quantity of one case, or the error that the call raised."""

    case: Case
    backend: str
    dtype: torch.dtype
    layout: str
    accuracy: Accuracy
    raised: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the call returned and was accurate."""
        return self.raised is None and self.accuracy.passed

    def as_json(self) -> dict[str, Any]:
        """For ``--json``. A JSON number cannot be infinite: an infinite error becomes null."""
        error, allowance = self.accuracy.error, self.accuracy.allowance
        return {
            "op": self.case.op,
            "form": self.case.form,
            "backend": self.backend,
            "dtype": _name(self.dtype),
            "layout": self.layout,
            "quantity": self.accuracy.quantity,
            "error": error if error != float("inf") else None,
            "allowance": allowance,
            "passed": self.passed,
            "raised": self.raised,
        }

    def __str__(self) -> str:
        where = f"{self.case.name}, {self.backend}, {_name(self.dtype)}, {self.layout}"
        if self.raised is not None:
            return f"{where}: raised {self.raised}"
        return f"{where}: {self.accuracy.quantity}: error {self.accuracy.error:.3g} of {self.accuracy.allowance:.3g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``validate``."""
    parser.add_argument(
        "--backend",
        action="append",
        choices=backends.BACKENDS,
        help="check this backend; may be repeated; default: every backend that is available",
    )
    parser.add_argument(
        "--op",
        action="append",
        choices=tuple(PUBLIC_OPS),
        metavar="OP",
        help=f"check this op; may be repeated; default: every one of {', '.join(PUBLIC_OPS)}",
    )
    parser.add_argument("--quick", action="store_true", help="a few forms of each op on a few layouts")
    parser.add_argument("--device", default="cpu", help="where the tensors lie, such as cpu or cuda (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every check")


def run(arguments: argparse.Namespace) -> int:
    """Check, print, and return 0 if all passed, 1 if a check failed, 2 if a backend asked for cannot serve an op."""
    start = time.perf_counter()
    try:
        names = _backend_names(arguments.backend, arguments.device)
    except RuntimeError as error:
        print(f"validate: {error}", file=sys.stderr)
        return NOT_AVAILABLE
    ops = arguments.op or PUBLIC_OPS
    cases = [case for case in CASES if case.op in ops and (case.representative or not arguments.quick)]
    records: list[Record] = []
    for case in with_progress(cases, "Validating", quiet=arguments.json):
        for layout in _layouts(case, arguments.quick):
            records.extend(_check(case, layout, names[case.op], arguments.device))
    failures = [record for record in records if not record.passed]
    seconds = time.perf_counter() - start
    if arguments.json:
        found = {
            "device": arguments.device,
            "passed": not failures,
            "checks": len(records),
            "failures": len(failures),
            "seconds": round(seconds, 1),
            "records": [record.as_json() for record in records],
        }
        print(json.dumps(found, indent=1))
    else:
        _print(records, failures, seconds)
    return FAILED if failures else PASSED


def _backend_names(asked: list[str] | None, device: str) -> dict[str, list[str]]:
    """For each op the backends to check.

    Raises:
        RuntimeError: when there is no such device, or a backend that was asked for cannot serve an op there.
    """
    z = torch.ones(1, 1, device=device)
    names: dict[str, list[str]] = {}
    for op in dict.fromkeys(case.op for case in CASES):
        reasons = {name: backends.why_not(name, op, z) for name in asked or backends.BACKENDS}
        missing = {name: reason for name, reason in reasons.items() if reason is not None}
        if asked and missing:
            name, reason = next(iter(missing.items()))
            raise RuntimeError(f"the backend {name} is not available: {reason}")
        names[op] = [name for name in reasons if name not in missing]
    return names


def _layouts(case: Case, quick: bool) -> list[Layout]:
    """All layouts for the representative forms of an op; the other forms differ from those only in the arithmetic."""
    if quick:
        return [layout for layout in case.layouts if layout.name in QUICK_LAYOUTS]
    return list(case.layouts) if case.representative else list(case.layouts[:1])


def _check(case: Case, layout: Layout, names: list[str], device: str) -> Iterator[Record]:
    for dtype, parameter_dtype in DTYPES:
        for name in names:
            try:
                judged = measure(case, layout, dtype, parameter_dtype, [name], device)[name]
            except Exception as error:  # a kernel that raises is a failed check, and the others must still run
                nothing = Accuracy("call", float("inf"), 0.0)
                yield Record(case, name, dtype, layout.name, nothing, f"{type(error).__name__}: {error}")
                continue
            for accuracy in judged:
                yield Record(case, name, dtype, layout.name, accuracy)


def _print(records: list[Record], failures: list[Record], seconds: float) -> None:
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.case.op, record.backend, _name(record.dtype)), []).append(record)
    rows = []
    for (op, backend, dtype), group in groups.items():
        worst = max(group, key=lambda record: record.accuracy.used)
        rows.append(
            [
                op,
                backend,
                dtype,
                str(len(group)),
                f"{worst.accuracy.error:.2g}",
                f"{worst.accuracy.allowance:.2g}",
                f"{worst.accuracy.quantity}, {worst.case.form}, {worst.layout}",
                "passed" if all(record.passed for record in group) else "FAILED",
            ]
        )
    columns = ["op", "backend", "dtype", "checks", "error", "allowance", "of the check closest to its allowance", ""]
    print_table("Forward and gradients against the float64 reference", columns, rows)
    shown = 20
    for record in failures[:shown]:
        print(f"FAILED {record}")
    if len(failures) > shown:
        print(f"... and {len(failures) - shown} more; --json lists all")
    print(f"{len(records)} checks, {len(failures)} failed, {seconds:.1f} s")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

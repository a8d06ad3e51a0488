"""Compiles the Triton kernels for GPUs that need not be here: registers, spills, width of loads and stores, atomics.

Which variants, and what the columns mean: :mod:`chainzrule_kernels.inspection`.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec

from chainzrule_kernels import inspection
from chainzrule_kernels.cli.output import print_table, with_progress

NOT_AVAILABLE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``inspect``."""
    parser.add_argument(
        "--arch",
        default=",".join(inspection.ARCHITECTURES),
        help="architectures, separated by commas, such as sm_90 or gfx942 (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16,float32",
        help=f"data types, separated by commas, of {', '.join(inspection.DTYPES)} (default: %(default)s)",
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--quick", action="store_true", help="only the cubic, without the activations")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")


def run(arguments: argparse.Namespace) -> int:
    """Compile and print.

    The exit status is 2 when Triton is missing or an argument is of no known form, otherwise 0.
    """
    if find_spec("triton") is None:
        print("inspect: Triton is not installed", file=sys.stderr)
        return NOT_AVAILABLE
    try:
        work = [
            (variant, arch, dtype)
            for arch in arguments.arch.split(",")
            for dtype in arguments.dtype.split(",")
            for variant in inspection.variants(inspection.itemsize(dtype), arch, quick=arguments.quick)
            if arguments.kernel in variant.name
        ]
        found = [inspection.inspect(*item) for item in with_progress(work, "Compiling", arguments.json)]
    except ValueError as error:
        print(f"inspect: {error}", file=sys.stderr)
        return NOT_AVAILABLE
    if arguments.json:
        print(json.dumps([result.as_json() for result in found], indent=2))
        return 0
    columns = ["kernel", "arch", "dtype", "registers", "spills", "shared", "load", "store", "atomics", "float64"]
    rows = [[str(value) for value in result.as_json().values()] for result in found]
    print_table("Compiled kernels; shared memory, loads and stores in bytes", columns, rows)
    return 0

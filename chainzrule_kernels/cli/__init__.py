"""The command line: ``python -m chainzrule_kernels {info,validate,demo,bench,inspect}``.

A command is a module here with ``add_arguments(parser)`` and ``run(arguments) -> exit status``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from chainzrule_kernels.cli import bench, demo, info, inspect, validate

COMMANDS = {"info": info, "validate": validate, "demo": demo, "bench": bench, "inspect": inspect}

OUTPUT_CLOSED = 128 + 13
"""The exit status that a shell gives a program which SIGPIPE ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0 when the command did what it was asked to and found nothing wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m chainzrule_kernels",
        description="Fused kernels for polynomial layers and layer-Jacobian regularisation (DREG) in PyTorch.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has read enough, as `head` does. Python would complain once more when it closes the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    return status

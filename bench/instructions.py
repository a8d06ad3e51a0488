"""Instructions per element of the CPU kernels, counted by callgrind: a figure that a noisy machine cannot move.

``python -m bench.instructions`` counts and compares with the figures kept in ``bench/results/instructions.json``;
``--update`` keeps the new ones. The kernels are those of AVX2, because valgrind knows no AVX-512. Each is run on one
tile of 32 rows and on one of 64 (``bench/instructions.cpp``): the difference of the two counts leaves out what a call
costs, and is divided by the difference of the elements. Counts say nothing of caches and little of time; they say
whether the compiler still makes the same loops of the sources.

The linear ops and the convolutions add a library's product to the kernels that are counted here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.record import versions

REPOSITORY = Path(__file__).resolve().parent.parent
KEPT = REPOSITORY / "bench" / "results" / "instructions.json"
DRIVER = REPOSITORY / "bench" / "instructions.cpp"
INSTRUCTION_SET = "avx2"

BOUND = 1.3
"""How many times the kept figure a count may be: room for another release of a compiler, not for another loop."""

Counts = dict[str, dict[str, float]]
"""Instructions per element by kernel and stage; an element is one of ``z``, however many tangents go with it."""


class UnavailableError(Exception):
    """Nothing can be counted on this machine; the message says why in one line."""


def count() -> tuple[Counts, str]:
    """Count, and name the compiler that made what was counted.

    Raises:
        UnavailableError: when valgrind, its headers, a compiler or the instruction set is missing.
    """
    if platform.machine() != "x86_64":
        raise UnavailableError(f"figures are kept for {INSTRUCTION_SET}, and this machine is {platform.machine()}")
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise UnavailableError("valgrind is not installed")
    kernels = _kernels()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "count"
        counted = f"-DCHAINZRULE_COUNTED_KERNELS=kernels_{INSTRUCTION_SET}"
        _compile([str(DRIVER), str(kernels), counted, "-o", str(program)])
        command = [valgrind, "--tool=callgrind", f"--callgrind-out-file={folder}/counts", str(program)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            said = finished.stderr.strip().splitlines()[-1:] or ["without a word"]
            raise UnavailableError(f"valgrind ended with {finished.returncode}: {said[0]}")
        dumps = [path.read_text() for path in Path(folder).glob("counts*")]
    return _per_element(dumps), _compiler_of(kernels)


def versions_and_counts() -> dict[str, Any]:
    """What is kept: the counts and all that they depend on.

    Raises:
        UnavailableError: as :func:`count`.
    """
    counts, compiler = count()
    valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": versions()["commit"],
        "compiler": compiler,
        "flags": _flags(),
        "counted_by": valgrind,
        "instruction_set": INSTRUCTION_SET,
        "instructions_per_element": counts,
    }


def kept() -> dict[str, Any]:
    """The figures in the repository, as :func:`versions_and_counts` wrote them."""
    content: dict[str, Any] = json.loads(KEPT.read_text())
    return content


def changes(counts: Counts, before: Counts) -> Iterator[tuple[str, str, float, float | None]]:
    """Kernel, stage, instructions per element now and before; None where there is no figure from before."""
    for kernel, stages in counts.items():
        for stage, now in stages.items():
            yield kernel, stage, now, before.get(kernel, {}).get(stage)


def same_family(compiler: str, other: str) -> bool:
    """Whether two compilers differ in their minor version at most, so that their counts can be compared."""
    return compiler.split(".")[0] == other.split(".")[0]


def _per_element(dumps: Sequence[str]) -> Counts:
    """From callgrind's files, one for each run of a kernel."""
    totals: dict[tuple[str, str], dict[int, int]] = {}
    for dump in dumps:
        trigger = re.search(r"^desc: Trigger: Client Request: (.+)\|(.+)\|(\d+)$", dump, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", dump, re.MULTILINE)
        if trigger and total:
            totals.setdefault((trigger[1], trigger[2]), {})[int(trigger[3])] = int(total[1])
    counts: Counts = {}
    for kernel, stage in sorted(totals, key=lambda key: (key[0], key[1] != "forward")):
        (fewer, few), (more, many) = sorted(totals[kernel, stage].items())
        counts.setdefault(kernel, {})[stage] = round((many - few) / (more - fewer), 3)
    return counts


def _kernels() -> Path:
    """The compiled kernels: those of the package's build where they are newer than their sources, or else new ones."""
    name = f"kernels_{INSTRUCTION_SET}"
    sources = [path for room in ("cpu", "math") for path in (REPOSITORY / "csrc" / room).iterdir()]
    newest_source = max(path.stat().st_mtime for path in [*sources, REPOSITORY / "setup.py"])
    own = REPOSITORY / "build" / "instructions" / f"{name}.o"
    built = [*REPOSITORY.glob(f"build/temp*/csrc/cpu/{name}.o"), *([own] if own.exists() else [])]
    for candidate in sorted(built, key=lambda path: path.stat().st_mtime, reverse=True):
        if candidate.stat().st_mtime > newest_source:
            return candidate
    own.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole: several processes may find it missing at once.
    partial = own.with_name(f"{name}-{os.getpid()}.o")
    source = REPOSITORY / "csrc" / "cpu" / f"{name}.cpp"
    _compile([*_flags(), "-fPIC", "-fvisibility=hidden", "-c", str(source), "-o", str(partial)])
    return partial.replace(own)


def _flags() -> list[str]:
    """The flags that decide what the kernels become, from setup.py."""
    flags: list[str] = runpy.run_path(str(REPOSITORY / "setup.py"), run_name="setup")["OPTIMISATION_FLAGS"]
    return flags


def _compile(arguments: Sequence[str]) -> None:
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, "-std=c++17", f"-I{REPOSITORY / 'csrc'}", *arguments]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UnavailableError(f"no C++ compiler ({compiler[0]}: {error.strerror})") from error
    if "valgrind/callgrind.h" in finished.stderr:
        raise UnavailableError("valgrind's headers are not installed")
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr}")


def _compiler_of(kernels: Path) -> str:
    """The compiler by the name that it left in what it compiled."""
    content = kernels.read_bytes()
    for name, pattern in (("gcc", rb"GCC: \(.*?\) (\d+\.\d+\.\d+)"), ("clang", rb"clang version (\d+\.\d+\.\d+)")):
        found = re.search(pattern, content)
        if found:
            return f"{name} {found[1].decode()}"
    return "unknown"


def main() -> int:
    """Count and compare, or count and keep."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.instructions",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"Exit status: 1 when a kernel takes more than {BOUND} times its kept figure, 2 when none was counted.",
    )
    parser.add_argument("--update", action="store_true", help="keep the new figures instead of comparing with the old")
    arguments = parser.parse_args()
    try:
        now = versions_and_counts()
    except UnavailableError as unavailable:
        print(f"bench.instructions: {unavailable}", file=sys.stderr)
        return 2
    never: dict[str, Any] = {"compiler": "none", "date": "never", "instructions_per_element": {}}
    before = kept() if KEPT.exists() else never
    print(f"now: {now['compiler']}, {now['instruction_set']}; kept: {before['compiler']}, {before['date']}")
    print(f"{'kernel':<58}{'stage':<10}{'now':>9}{'kept':>9}{'ratio':>8}")
    grown = False
    for kernel, stage, count_now, count_before in changes(
        now["instructions_per_element"], before["instructions_per_element"]
    ):
        ratio = count_now / count_before if count_before else None
        grown |= ratio is not None and ratio > BOUND
        cells = "" if ratio is None else f"{count_before:>9.2f}{ratio:>8.2f}"
        print(f"{kernel:<58}{stage:<10}{count_now:>9.2f}{cells}")
    if arguments.update:
        KEPT.write_text(json.dumps(now, indent=2) + "\n")
        print(f"written to {KEPT}")
        return 0
    return int(grown)


if __name__ == "__main__":
    raise SystemExit(main())

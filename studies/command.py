"""What the commands share: their options, and running what is missing under a progress bar."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from studies.store import Columns, Row, Store


def parser(name: str, documentation: str | None, *, reads_pima: bool = False) -> argparse.ArgumentParser:
    """The options that every study has, under its documentation's first line; ``--data`` if it reads the Pima data."""
    description = (documentation or "").partition("\n")[0]
    result = argparse.ArgumentParser(prog=f"python -m studies.{name}", description=description)
    result.set_defaults(study=name, report=False)
    result.add_argument(
        "--quick", action="store_true", help="a few short runs, to see that everything works: the figures mean nothing"
    )
    result.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for results and pictures (default: studies-output, or studies-output/quick); runs found there are kept",
    )
    if reads_pima:
        result.add_argument(
            "--data",
            type=Path,
            metavar="PATH",
            help="CSV file of the Pima diabetes data (default: fetched from OpenML)",
        )
    return result


def folder(arguments: argparse.Namespace) -> Path:
    """Where the results go. Quick runs never mix with full ones."""
    if arguments.out is not None:
        return Path(arguments.out)
    return Path("studies-output", "quick") if arguments.quick else Path("studies-output")


def rows(
    arguments: argparse.Namespace,
    name: str,
    columns: tuple[Columns, Columns],
    settings: Mapping[str, Any],
    configurations: Sequence[Row],
    run: Callable[[Row], Row],
) -> list[Row]:
    """The rows of the configurations; those that are not in the store yet are run first.

    Args:
        arguments: of the command. Where they ask for the report alone, nothing is run.
        name: of the store.
        columns: its keys and its values.
        settings: what all runs share.
        configurations: all of them.
        run: from a configuration to the values of its run.
    """
    with refusing(arguments):
        store = Store(folder(arguments), name, *columns, settings)
    if not arguments.report:
        run_missing(name, store, configurations, run)
    return store.of(configurations)


@contextmanager
def refusing(arguments: argparse.Namespace) -> Iterator[None]:
    """What cannot be read or written, or is not what it should be, ends the command in one line, with status 2.

    For the data and the store, before anything is trained; an error in a training keeps its traceback.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"python -m studies.{arguments.study}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_missing(title: str, store: Store, configurations: Iterable[Row], run: Callable[[Row], Row]) -> None:
    """Run the configurations that the store does not have. Interrupted, it exits with status 130, and goes on later.

    Args:
        title: for the progress bar.
        store: where each result is kept as soon as it is there.
        configurations: all of the study.
        run: from a configuration to the values of its run.
    """
    configurations = list(configurations)
    missing = store.missing(configurations)
    # Networks this small gain nothing from a second thread, and the results depend on the number of them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress(title, len(configurations), len(configurations) - len(missing)) as advance:
            for configuration in missing:
                store.add(configuration, run(configuration))
                advance()
    except KeyboardInterrupt:
        print(f"{title}: interrupted; the same command goes on after {len(store.rows)} runs", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        torch.set_num_threads(threads)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table in Markdown."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


@contextmanager
def progress(title: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A bar where the output is a terminal, and a line a minute elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    count, told = done, time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done)

        def advance() -> None:
            nonlocal count, told
            count += 1
            bar.advance(task)
            if not console.is_terminal and (time.monotonic() - told > 60 or count == total):
                told = time.monotonic()
                print(f"{title}: {count} of {total}", file=sys.stderr, flush=True)

        yield advance

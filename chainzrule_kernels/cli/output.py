"""Tables and progress: with rich on a terminal, plain text everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TypeVar

Item = TypeVar("Item")

_STYLES = {"FAILED": "bold red", "MISSED": "bold yellow", "passed": "green", "met": "green"}


def is_rich() -> bool:
    """Whether the output is a terminal and rich is installed."""
    return sys.stdout.isatty() and find_spec("rich") is not None


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their column names."""
    if is_rich():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        Console().print(table)
        return
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    print(title)
    for row in (columns, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def with_progress(items: Sequence[Item], description: str, quiet: bool) -> Iterator[Item]:
    """Go through the items, with a progress bar on a terminal."""
    if quiet or not is_rich():
        yield from items
        return
    from rich.progress import track

    yield from track(items, description, transient=True)

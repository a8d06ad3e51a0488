"""Results that survive: one line of CSV for each run, written when the run is over, and read again at the next start.

A study is a list of configurations. The store knows which of them are done, so that a study that was killed goes on
where it was when the same command is given again. Beside ``NAME.csv`` lies ``NAME.json`` with the settings that all
runs share, the machine and the versions.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.record import machine, versions

Row = dict[str, Any]
Columns = Mapping[str, type]
"""Names of columns with ``str``, ``int`` or ``float``. NaN in a float column is an empty cell."""


class Store:
    """The runs of a study.

    Args:
        folder: where the files lie; made if it is not there.
        name: of the files.
        keys: the columns that make up a configuration; no two runs agree in all of them.
        values: the columns that a run fills.
        settings: what all runs share, as JSON knows it.

    Raises:
        ValueError: when the files are there and were made with other columns or settings.

    Attributes:
        rows: of all runs that are done, in the order in which they were.
    """

    def __init__(self, folder: Path, name: str, keys: Columns, values: Columns, settings: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}.csv"
        self.keys = tuple(keys)
        self._types = {**keys, **values}
        folder.mkdir(parents=True, exist_ok=True)
        self._describe(folder / f"{name}.json", json.loads(json.dumps(dict(settings))))
        self.rows: list[Row] = self._read()
        self._done = {self._key(row) for row in self.rows}

    def missing(self, configurations: Iterable[Row]) -> list[Row]:
        """Those that have no run yet."""
        return [configuration for configuration in configurations if self._key(configuration) not in self._done]

    def of(self, configurations: Iterable[Row]) -> list[Row]:
        """The rows of these configurations, in the order of the store."""
        asked = {self._key(configuration) for configuration in configurations}
        return [row for row in self.rows if self._key(row) in asked]

    def add(self, configuration: Row, results: Row) -> None:
        """Keep a run; it is on the disk when this returns.

        Raises:
            ValueError: for other columns than the store's, and for a configuration that has a run.
        """
        row = {**configuration, **results}
        if set(row) != set(self._types):
            raise ValueError(f"row: expected the columns {', '.join(self._types)}, got {', '.join(row)}")
        if self._key(row) in self._done:
            raise ValueError(f"configuration: {configuration} has a run already")
        # One write, so that a process that is killed leaves a whole line or a half one, which the next start cuts off.
        with self.path.open("a", newline="") as file:
            file.write(_line([_cell(row[name]) for name in self._types]))
        # What is kept is what the next start would read.
        self._keep({name: self._parse(name, _cell(row[name])) for name in self._types})

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self._done.add(self._key(row))

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(_cell(row[name]) for name in self.keys)

    def _parse(self, name: str, cell: str) -> Any:
        kind = self._types[name]
        return float("nan") if kind is float and cell == "" else kind(cell)

    def _read(self) -> list[Row]:
        header = list(self._types)
        content = self.path.read_text() if self.path.exists() else ""
        whole, _, half = content.rpartition("\n")
        if not whole:
            self.path.write_text(_line(header))
            return []
        if half:
            self.path.write_text(whole + "\n")
        lines = list(csv.reader(io.StringIO(whole)))
        if lines[0] != header:
            raise ValueError(
                f"out: {self.path} has the columns {', '.join(lines[0])} where {', '.join(header)} are expected; "
                "choose another folder, or remove the file"
            )
        return [{name: self._parse(name, cell) for name, cell in zip(header, line, strict=True)} for line in lines[1:]]

    def _describe(self, path: Path, settings: Mapping[str, Any]) -> None:
        if path.exists():
            before = json.loads(path.read_text())["settings"]
            if before != settings:
                raise ValueError(
                    f"out: the runs in {path.parent} were made with {before}, not with {settings}; choose another "
                    f"folder, or remove {self.path.name} and {path.name}"
                )
            return
        if self.path.exists():
            raise ValueError(f"out: {self.path} has no {path.name} beside it, which has its settings")
        description = {
            "begun": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "settings": settings,
            "machine": machine(),
            "versions": versions(),
        }
        path.write_text(json.dumps(description, indent=2) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.5g}"
    return str(value)


def _line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()

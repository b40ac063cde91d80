"""What commands print: JSON, tables, words for sizes, bars of progress."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qigen.build import Progress

_WIDTH = 160  # of tables that go to a file


def print_json(value: Any) -> None:
    click.echo(json.dumps(_finite(value), indent=1, ensure_ascii=False))


class JsonList:
    """A list of JSON on standard output, an item at a time; each is there as soon as it is added.

    After an error or Ctrl-C the list is closed by :meth:`close`, and what is printed is whole; the
    error then goes to standard error only, while ``begun``.
    """

    begun = False

    def __init__(self) -> None:
        self.count = 0
        JsonList.begun = False

    def add(self, value: Any) -> None:
        """Prints the next item."""
        text = json.dumps(_finite(value), ensure_ascii=False)
        click.echo(("[\n" if self.count == 0 else ",\n") + text, nl=False)
        sys.stdout.flush()
        self.count += 1
        JsonList.begun = True

    def close(self) -> None:
        """Ends the list."""
        click.echo("\n]" if self.count else "[]")


def _finite(value: Any) -> Any:
    """The value with null for the numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output; columns whose names begin with '>' are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
    for i, column in enumerate(columns):
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=i == 0,  # names are never cut
            overflow="fold",  # nor is anything else left out
        )
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: nothing in it is markup
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        if line := line.rstrip():
            click.echo(line)
    click.echo()


def shape_text(sizes: Iterable[object]) -> str:
    return "x".join(map(str, sizes)) or "scalar"


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Dictionaries as a table; a column for every key, numbers to the right."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numbers = {
        key for key in columns if all(isinstance(row.get(key, 0), (int, float)) for row in rows)
    }

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.6g}"
        if isinstance(value, dict):
            return schedule_text(value)
        if isinstance(value, (list, tuple)):
            return ", ".join(map(cell, value))
        return "" if value is None else str(value)

    click.echo(title)
    print_table(
        [f">{key}".replace("_", " ") if key in numbers else key.replace("_", " ")
         for key in columns],
        ([cell(row.get(key)) for key in columns] for row in rows),
    )  # fmt: skip


def schedule_text(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def size_text(count: float) -> str:
    from rich.filesize import decimal

    return decimal(int(count))


def memory_text(manifest: dict[str, Any]) -> str:
    """The arena of a graph model in words."""
    memory = manifest["memory"]
    if memory["planned_at"] == "run":
        return "an arena that is laid out for the sizes of each run"
    least = memory["activations_lower_bound_bytes"]
    return f"an arena of {size_text(memory['arena_bytes'])} ({size_text(least)} live at the most)"


@contextlib.contextmanager
def progress_bars(as_json: bool) -> Iterator[Progress]:
    """A bar for every stage on standard error, if somebody watches."""
    if as_json or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield report

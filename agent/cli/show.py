"""How rows are printed: a table for people, JSON or YAML as they came."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]

# What a terminal has at least; output that goes elsewhere gets the same.
WIDTH = 80
# `-o wide` into a file or pipe: nothing is folded there.
WIDE_WIDTH = 400

output = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How to print; wide is a table with more columns.",
)


@dataclass(frozen=True)
class Column:
    title: str
    text: Callable[[Row], str]
    wide: bool = False
    right: bool = False


def rows(found: Sequence[Row], columns: Sequence[Column], form: str, empty: str) -> None:
    """Sorts by the first columns, as texts. `empty` is what people read when there is nothing."""
    if form in ("json", "yaml"):
        data(list(found), form)
        return
    if not found:
        click.echo(empty)
        return
    shown = [column for column in columns if form == "wide" or not column.wide]
    lines = sorted([column.text(row) for column in shown] for row in found)
    table(shown, lines, wide=form == "wide")


def data(found: Any, form: str) -> None:
    if form == "yaml":
        import yaml

        click.echo(yaml.safe_dump(found, sort_keys=False, allow_unicode=True), nl=False)
    else:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))


def console(*, wide: bool = False) -> "Console":
    from rich.console import Console

    if sys.stdout.isatty():
        width = shutil.get_terminal_size((WIDTH, 24)).columns
    else:
        width = WIDE_WIDTH if wide else WIDTH
    return Console(width=width, highlight=False, soft_wrap=False)


def paint(*parts: Any, wide: bool = False) -> None:
    """Prints without the blanks with which rich fills lines up."""
    target = console(wide=wide)
    with target.capture() as captured:
        for part in parts:
            target.print(part)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def table(columns: Sequence[Column], lines: Sequence[Sequence[str]], *, wide: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    painted = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        painted.add_column(
            column.title, justify="right" if column.right else "left", overflow="fold"
        )
    for line in lines:
        # Text, not markup: names come from outside and may hold brackets.
        painted.add_row(*(Text(cell, overflow="fold") for cell in line))
    paint(painted, wide=wide)


# ---- texts of cells


def joined(values: Sequence[Any] | None) -> str:
    return ", ".join(str(value) for value in values or ()) or "-"


def span(seconds: float) -> str:
    """A length of time in its two largest units."""
    left = int(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"

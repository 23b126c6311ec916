"""One finding of the doctor, and how a list of them is shown."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "absent", "wrong"]
"""`absent`: training works without it, at the cost that the row names. `wrong`: present but unusable."""

_STYLE = {"ok": "green", "absent": "yellow", "wrong": "bold red"}


@dataclass(frozen=True)
class Row:
    """Result of one check."""

    name: str
    status: Status
    found: str
    """Version, place or number."""
    advice: str = ""
    """Cost of its absence and how to install it, or how to repair it. Empty where nothing is to be done."""


def ok(name: str, found: str) -> Row:
    """Row of something present and usable."""
    return Row(name, "ok", found)


def absent(name: str, cost: str) -> Row:
    """Row of something absent; `cost` is the effect of its absence and how to get it."""
    return Row(name, "absent", "-", cost)


def wrong(name: str, found: str, fix: str) -> Row:
    """Row of something present but unusable; `fix` is the remedy."""
    return Row(name, "wrong", found, fix)


def exit_code(rows: Iterable[Row], required: Iterable[str]) -> int:
    """1 if anything is wrong, or absent though required; else 0."""
    needed = set(required)
    return int(any(row.status == "wrong" or (row.status == "absent" and row.name in needed) for row in rows))


def as_json(rows: Iterable[Row]) -> str:
    """A list of objects with the fields of `Row`."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def show(rows: Iterable[Row], console: Console) -> None:
    """A table, a row per finding; advice wraps below what was found."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        told = Text(row.found)
        if row.advice:
            told.append(f"\n{row.advice}" if row.found != "-" else "", style="dim")
            if row.found == "-":
                told = Text(row.advice, style="dim")
        table.add_row(row.name, Text(row.status, style=_STYLE[row.status]), told)
    console.print(table)

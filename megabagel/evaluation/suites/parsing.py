"""Reading of benchmark files and of judges' answers: strict about form and range, no guess where a value is absent."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megabagel.errors import UserError
from megabagel.journal import Record


def data_path(path: Path | None, what: str) -> Path:
    """The path. Raises UserError if it was not given or is not there."""
    if path is None:
        raise UserError(f"--data is absent; expected {what}")
    if not path.exists():
        raise UserError(f"--data {path}: not there; expected {what}")
    return path


def records(path: Path) -> list[tuple[str, Any]]:
    """(place for messages, record) of a JSON list, a JSON object of objects, JSONL, CSV or TSV file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
            return [(f"{path}, line {number}", json.loads(line)) for number, line in lines]
        if path.suffix in (".csv", ".tsv"):
            # Cells of MMBench hold whole images.
            csv.field_size_limit(2**31 - 1)
            table = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",")
            return [(f"{path}, row {number}", row) for number, row in enumerate(table, 2)]
        content = json.loads(text)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected the suite's file") from error
    if isinstance(content, dict):
        return [(f"{path}, {key}", {"key": key, **need_object(value, path, key)}) for key, value in content.items()]
    if not isinstance(content, list):
        raise UserError(f"{path}: holds {type(content).__name__}; expected a list of items")
    return [(f"{path}, item {number}", record) for number, record in enumerate(content)]


def need_object(value: Any, path: Path, key: str) -> Record:
    """The object. Raises UserError for another value."""
    if not isinstance(value, dict):
        raise UserError(f"{path}, {key}: holds {type(value).__name__}; expected an object")
    return value


def images_of(names: str | Sequence[str], folder: Path, where: str) -> list[str]:
    """Paths of an item's input images. Raises UserError for one that is not there."""
    paths = [folder / name for name in ([names] if isinstance(names, str) else names)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{where}: the image {path} is not there; expected the suite's images beside its file")
    return [str(path) for path in paths]


def json_in(text: str) -> Record | None:
    """The first JSON object in an answer, inside prose or a code fence; None without one."""
    decoder = json.JSONDecoder()
    for found in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text[found.start() :])
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None


def in_range(value: Any, low: float, high: float) -> float | None:
    """A number inside its range, also as the text of one; None for anything else (booleans, NaN, 8 of 5, words)."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return None
    return float(value)


def numbers_in(values: Any, count: int, low: float, high: float) -> list[float] | None:
    """Exactly `count` numbers in range; None for anything else.

    Args:
        values: a parsed answer.
        count: length of the list.
        low: least number.
        high: largest number.
    """
    if not isinstance(values, list) or len(values) != count:
        return None
    found = [in_range(value, low, high) for value in values]
    return None if None in found else [value for value in found if value is not None]


def named_number(text: str, name: str, low: float, high: float) -> float | None:
    """The number of a line such as `Realism: 2` or `**Realism**: 2`; None if absent, ambiguous or out of range.

    Args:
        text: an answer.
        name: before the number, in any case.
        low: least number.
        high: largest number.
    """
    found = set(re.findall(rf"{re.escape(name)}[\s*_:=\"']*[:=][\s*_\"']*(-?\d+(?:\.\d+)?)", text, re.IGNORECASE))
    return in_range(found.pop(), low, high) if len(found) == 1 else None


def fill(template: str, **values: object) -> str:
    """Replace {name} by its value; other braces stay, since templates show JSON."""
    for name, value in values.items():
        template = template.replace("{" + name + "}", str(value))
    return template

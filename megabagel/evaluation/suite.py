"""Suites: items to generate, questions to a judge, and the rule that makes a table of its answers.

    read       the user's benchmark files -> items
    generate   item -> picture or answer, in the layout of the official scripts
    requests   item and output -> questions to a judge; or `exact`: a program scores the output
    aggregate  scores -> table, by the published script or by what it was meant to do

A suite is data and pure functions. Stages, files, ranks and judges are elsewhere (`run.py`, `judges/`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from megabagel.errors import UserError
from megabagel.evaluation.intervals import Estimate, mean
from megabagel.journal import Record

Item = dict[str, Any]
"""JSON values: `id`, `ability` (draw, edit, ask), `tag`, `prompt`, `images` (input files), and fields of the suite."""
Rule = Literal["published", "intended"]
"""How scores are aggregated: as the released script does it, or as its paper describes it. They differ where a script
has a defect (docs/evaluation.md#aggregation)."""


@dataclass(frozen=True)
class Request:
    """One question to a judge."""

    criterion: str
    parts: tuple[str | Path, ...]
    """Texts and image files, in the order of the message."""
    system: str | None = None
    max_tokens: int = 1000


@dataclass(frozen=True)
class Row:
    """An output with its scores."""

    item: Item
    sample: int
    scores: Record
    text: str | None = None
    """The answer, of questions."""


@dataclass(frozen=True)
class Line:
    """A line of a suite's table."""

    name: str
    estimate: Estimate | None
    """None where nothing was scored."""
    scale: float = 1.0
    """Factor of the published numbers: 100 for percentages."""


Answer = Record
"""Scores by name, as `Suite.parse` reads them from one answer."""


def _no_requests(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    return []


def _no_parse(item: Item, criterion: str, text: str) -> Answer | None:
    return None


def _no_export(rows: Sequence[Row], out: Path) -> None:
    return None


def _no_companions(item: Item, record: Record) -> Mapping[str, bytes]:
    return {}


def opened(item: Item, size: int) -> list[Image.Image | Path]:
    """The input images of an item: its files."""
    return [Path(path) for path in item.get("images", ())]


@dataclass(frozen=True)
class Suite:
    """A benchmark."""

    name: str
    read: Callable[[Path | None], list[Item]]
    """Items of the benchmark files at a path (None: the suite needs none)."""
    output: Callable[[Item, int], str]
    """Path of a picture (item, sample) in the official layout, below OUT/outputs."""
    aggregate: Callable[[Sequence[Row], Rule], list[Line]]
    requests: Callable[[Item, Path | str, Mapping[str, str]], list[Request]] = _no_requests
    """Questions about an output (a picture's file or an answer), with the templates of the user or of the suite."""
    parse: Callable[[Item, str, str], Answer | None] = _no_parse
    """Scores in a judge's answer (item, criterion, text); None if there are none in the expected form and range."""
    exact: Callable[[Item, Path | str], Answer] | None = None
    """Scores of an output by a program, which then is the default judge."""
    gate: Callable[[], Record] | None = None
    """Errors of the program itself, measured before it may judge; raises UserError if they are too large."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Questions to judges in our own words, by criterion. Results by other words than the official ones are not
    comparable with published numbers; `--templates` reads those."""
    export: Callable[[Sequence[Row], Path], None] = _no_export
    """Writes the answer files that the official scorer or server expects."""
    companions: Callable[[Item, Record], Mapping[str, bytes]] = _no_companions
    """Files beside a picture in the official layout, by path below OUT/outputs, from item and record."""
    inputs: Callable[[Item, int], list[Any]] = opened
    """Input images of an item (files or pictures); the number is the side of drawn pages in pixels."""
    preset: str | None = None
    """Sampler settings (`inference/presets.py`)."""
    samples: int = 1
    """Pictures per item."""
    seed: int | None = None
    """Seed of every picture where the official script sets one; None: keyed by suite, item and sample."""
    think: bool = False
    size: int | None = None
    """Side of pictures in pixels; None: the model's default."""
    max_new_tokens: int = 1000
    data: str = ""
    """Content of the file that `--data` names, for messages and documentation."""
    headlines: tuple[str, ...] = ()
    """Lines that a picture of emergence follows; none: the first one."""
    rules: tuple[Rule, ...] = ("published",)
    """Aggregations that differ; the first is the default."""


def by_name(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """Rows in groups by a field of their items, in order of first occurrence."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.item[name]), []).append(row)
    return found


def mean_of(rows: Sequence[Row], score: str) -> Estimate | None:
    """Mean of a score over rows."""
    return mean([float(row.scores[score]) for row in rows])


def average(parts: Sequence[Estimate | None]) -> Estimate | None:
    """Unweighted mean of the means of groups, as most suites define their overall score; None parts are left out.

    The interval combines those of the groups, which are independent: half widths add in squares.
    """
    known = [part for part in parts if part is not None]
    if not known:
        return None
    value = sum(part.value for part in known) / len(known)
    low, high = (
        sum((getattr(part, side) - part.value) ** 2 for part in known) ** 0.5 / len(known) for side in ("low", "high")
    )
    return Estimate(value, value - low, value + high, sum(part.count for part in known))


def need(record: Any, names: Mapping[str, type | tuple[type, ...]], where: str) -> Record:
    """A JSON object with fields of these types. Raises UserError that names place and field."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: no JSON object; expected the fields {', '.join(names)}")
    for name, kind in names.items():
        if not isinstance(record.get(name), kind) or (kind is int and isinstance(record[name], bool)):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            words = " or ".join(each.__name__ for each in kinds)
            raise UserError(f"{where}: {name} = {record.get(name)!r:.60}; expected {words}. Is it the suite's file?")
    return record


def distinct(items: list[Item], path: Path | None) -> list[Item]:
    """The items. Raises UserError if an id is there twice, or if there is none."""
    if not items:
        raise UserError(f"{path}: no items; expected the suite's file")
    seen: set[str] = set()
    for item in items:
        if item["id"] in seen:
            raise UserError(f"{path}: the item {item['id']!r} is there twice; remove one")
        seen.add(item["id"])
    return items

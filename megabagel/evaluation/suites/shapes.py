"""Suite `shapes`: drawn pages of coloured figures, judged exactly by a program; no files, no network.

Tags of `draw` are GenEval's; `edit` has single and two-step edits; `ask` ends with yes/no pairs (MME's acc and acc+).
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megabagel.errors import UserError
from megabagel.evaluation import shapes_suite
from megabagel.evaluation.intervals import proportion
from megabagel.evaluation.suite import Item, Line, Row, Rule, Suite, average, by_name, mean_of
from megabagel.journal import Record

SEED, PER_ABILITY = 0, 120
"""Of the items; 120 of each ability are 20 per tag of GenEval."""
SIZE = 64
"""Side of a page: that of the data set `scenes`."""
MOST_WRONG = 0.02
"""Largest share of wrong outputs that the checker may accept."""


def read(path: Path | None) -> list[Item]:
    """The held-out items: a fixed function of `SEED`."""
    if path is not None:
        raise UserError(f"--data {path}: the suite shapes has no files; leave it out")
    items = shapes_suite.shapes_suite(SEED, PER_ABILITY)
    # Interleaved, so that `--limit` keeps the share of every ability and tag.
    parts = [[item for item in items if item["ability"] == ability] for ability in ("draw", "edit", "ask")]
    return [item for turn in zip(*parts, strict=True) for item in turn]


def exact(item: Item, output: Path | str) -> Record:
    """Whether an output is right."""
    if isinstance(output, str):
        return shapes_suite.check(item, output)
    with Image.open(output) as image:
        return shapes_suite.check(item, np.asarray(image.convert("RGB")))


@lru_cache
def gate() -> Record:
    """The checker's own errors on rendered truths and on pictures with one thing wrong."""
    shares = shapes_suite.self_test(SEED, 60, SIZE)
    if shares["truths"] < 1 or shares["wrong"] > MOST_WRONG:
        raise UserError(
            f"shapes: the checker accepts {shares['truths']:.1%} of truths (expected 100 %) and {shares['wrong']:.1%} "
            f"of wrong outputs (at most {MOST_WRONG:.0%}), so it judges nothing; report this"
        )
    return shares


def aggregate(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """Shares of right outputs by ability and tag; `draw` is the mean of the six tags, as GenEval's overall score."""
    lines: list[Line] = []
    for ability, members in by_name(rows, "ability").items():
        tags = {tag: mean_of(part, "correct") for tag, part in by_name(members, "tag").items()}
        lines.append(Line(ability, average(list(tags.values())) if ability == "draw" else mean_of(members, "correct")))
        lines += [Line(f"{ability}: {tag}", estimate) for tag, estimate in tags.items()]
        if ability == "edit":
            lines += [Line(f"edit: {side}", mean_of(members, side)) for side in ("made", "kept")]
    pairs: dict[int, list[bool]] = {}
    for row in rows:
        if row.item["tag"] == "yes/no":
            pairs.setdefault(row.item["pair"], []).append(row.scores["correct"])
    whole = [all(pair) for pair in pairs.values() if len(pair) == 2]
    return [*lines, Line("ask: yes/no acc+", proportion(sum(whole), len(whole)))] if whole else lines


def inputs(item: Item, size: int) -> list[Any]:
    """The page that an edit begins with or a question is about."""
    page = shapes_suite.page_of(item, size)
    return [] if page is None else [Image.fromarray(page)]


SHAPES = Suite(
    "shapes",
    read,
    lambda item, sample: f"{item['ability']}/{item['id']}.png",
    aggregate,
    exact=exact,
    gate=gate,
    inputs=inputs,
    size=SIZE,
    max_new_tokens=40,
    headlines=("ask", "draw", "edit", "edit: two_step", "edit: conceptual"),
)

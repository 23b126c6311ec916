"""RISE: edits that need temporal, causal, spatial or logical reasoning.

Two aggregations. `published`: as the released script, which weighs every temporal, causal and spatial row as one free
of consistency once any row has the field `consistency_free` (an absent value is NaN there, which is true). `intended`:
only rows that have it set.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megabagel.evaluation.intervals import mean
from megabagel.evaluation.suite import Item, Line, Request, Row, Rule, Suite, by_name, distinct, need
from megabagel.evaluation.suites.parsing import data_path, fill, images_of, in_range, records
from megabagel.journal import Record

DATA = "datav2_total_w_subtask.json of RISEBench, with the images beside it"
LOGICAL = "logical_reasoning"


def read(path: Path | None) -> list[Item]:
    """Items of RISEBench."""
    items = []
    for where, record in records(path := data_path(path, DATA)):
        need(record, {"index": str, "category": str, "image": str, "instruction": str}, where)
        about = {"tag": record["category"], "prompt": record["instruction"], "index": record["index"]}
        free = {"consistency_free": record.get("consistency_free")}
        reference = next((record[name] for name in ("reference", "reference_txt") if record.get(name)), "")
        shown = {"images": images_of(record["image"], path.parent, where), "reference": reference}
        items.append({"id": record["index"], "ability": "edit", **about, **free, **shown})
    return distinct(items, path)


def requests(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """Consistency and reasoning with both pictures, plausibility with the edited one; of logical edits two numbers."""
    assert isinstance(output, Path)
    both = (*map(Path, item["images"]), output)
    words = {"instruction": item["prompt"], "reference": item["reference"]}
    if item["tag"] == LOGICAL:
        return [Request("logical", (fill(templates["logical"], **words), *both))]
    names = ("consistency", "reasoning") if not item["consistency_free"] else ("reasoning",)
    asked = [Request(name, (fill(templates[name], **words), *both)) for name in names]
    return [*asked, Request("plausibility", (templates["plausibility"], output))]


def parse(item: Item, criterion: str, text: str) -> Record | None:
    """The last `Final Score: n`: 1 to 5, or for logical edits consistency and reasoning of 0 or 1, as 1 or 5."""
    found = re.findall(r"final score\**\s*:?\**\s*:?\s*([\d.,\s]+)", text, re.IGNORECASE)
    numbers = re.findall(r"\d+(?:\.\d+)?", found[-1]) if found else []
    if criterion != "logical":
        score = in_range(float(numbers[0]), 1, 5) if len(numbers) == 1 else None
        return None if score is None else {criterion: score}
    if len(numbers) != 2 or any(float(number) not in (0, 1) for number in numbers):
        return None
    consistency, reasoning = (1 + 4 * float(number) for number in numbers)
    return {"consistency": consistency, "reasoning": reasoning}


def score(row: Row, free: bool) -> float:
    """Weighted score from 1 to 5; reasoning of 1 halves it.

    Args:
        row: with its scores.
        free: whether consistency does not count.
    """
    scores = row.scores
    if row.item["tag"] == LOGICAL:
        total = 0.3 * scores["consistency"] + 0.7 * scores["reasoning"]
    elif free:
        total = 0.8 * scores["reasoning"] + 0.2 * scores["plausibility"]
    else:
        total = 0.3 * scores["consistency"] + 0.5 * scores["reasoning"] + 0.2 * scores["plausibility"]
    return max(1.0, total / 2) if scores["reasoning"] == 1 else total


def aggregate(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """Percentage 25 (s - 1) and accuracy (share with all fives), overall and by category."""
    any_free = any(row.item["consistency_free"] is not None for row in rows)

    def free(row: Row) -> bool:
        return any_free if rule == "published" else bool(row.item["consistency_free"])

    lines = []
    for name, part in {"overall": list(rows), **by_name(rows, "tag")}.items():
        fives = [float(all(value == 5 for value in row.scores.values())) for row in part]
        lines.append(Line(f"{name}: accuracy", mean(fives), 100))
        lines.append(Line(f"{name}: score", mean([25 * (score(row, free(row)) - 1) for row in part])))
    return lines


_BOTH = "The last picture is an edit of the one before by: {instruction}\nExpected: {reference}\n"
RISE = Suite(
    "rise",
    read,
    lambda item, sample: f"{item['tag']}/{item['index']}.png",
    aggregate,
    requests=requests,
    parse=parse,
    templates={
        "consistency": _BOTH + "From 1 to 5, is everything else unchanged? End with `Final Score: N`.",
        "reasoning": _BOTH + "From 1 to 5, is the result what the instruction implies? End with `Final Score: N`.",
        "plausibility": "From 1 to 5, is the picture real, sharp and free of artefacts? End with `Final Score: N`.",
        "logical": _BOTH + "Give 0 or 1 for: the rest is unchanged; the answer is right. End with `Final Score: N, N`.",
    },
    preset="rise",
    think=True,
    data=DATA,
    rules=("published", "intended"),
)

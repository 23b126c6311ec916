"""GenEval: six tags of text-to-image prompts, scored from the boxes of an object detector.

Rules of the official script (docs/evaluation.md#geneval): confidence above 0.3 (counting 0.9), at most 16 boxes per
class; a class is there with at least `count` boxes, of which the first `count` are used; `exclude` forbids as many;
positions compare centres after the sizes' tenth is taken off each axis.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from megabagel.evaluation.suite import Item, Line, Request, Row, Rule, Suite, average, by_name, distinct, mean_of, need
from megabagel.evaluation.suites.parsing import data_path, in_range, json_in, records
from megabagel.journal import Record

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
DETECTIONS = "detections"
THRESHOLD, COUNTING_THRESHOLD, MOST_BOXES = 0.3, 0.9, 16
DATA = "GenEval's evaluation_metadata.jsonl"

Box = tuple[float, float, float, float]


def read(path: Path | None) -> list[Item]:
    """Items of GenEval's metadata, one JSON object a line."""
    items = []
    for number, (where, record) in enumerate(records(path := data_path(path, DATA))):
        need(record, {"tag": str, "include": list, "prompt": str}, where)
        items.append({**record, "id": f"{number:05d}", "ability": "draw", "metadata": record})
    return distinct(items, path)


def companions(item: Item, record: Record) -> Mapping[str, bytes]:
    """metadata.jsonl of the prompt's folder, which the official evaluator reads."""
    return {f"{item['id']}/metadata.jsonl": (json.dumps(item["metadata"]) + "\n").encode()}


def requests(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """One question: the boxes of all objects."""
    assert isinstance(output, Path)
    return [Request(DETECTIONS, (templates[DETECTIONS], output))]


def parse(item: Item, criterion: str, text: str) -> Record | None:
    """Whether the picture is right, from {"objects": [{"class", "box", "score", "color"}]}."""
    answer = json_in(text)
    objects = answer.get("objects") if answer else None
    if not isinstance(objects, list) or not all(map(_is_object, objects)):
        return None
    return {"correct": correct(item, objects)}


def _is_object(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("class"), str):
        return False
    box = value.get("box")
    whole = isinstance(box, list) and len(box) == 4 and all(in_range(x, -1e6, 1e6) is not None for x in box)
    return whole and in_range(value.get("score"), 0, 1) is not None


def correct(item: Item, objects: Sequence[Record]) -> bool:
    """The official rule."""
    least = COUNTING_THRESHOLD if item["tag"] == "counting" else THRESHOLD
    by_class: dict[str, list[Record]] = {}
    for found in sorted(objects, key=lambda found: -found["score"]):
        members = by_class.setdefault(found["class"], [])
        if found["score"] > least and len(members) < MOST_BOXES:
            members.append(found)
    matched: list[list[Record] | None] = []
    for wanted in item["include"]:
        members = by_class.get(wanted["class"], [])[: wanted["count"]]
        holds = len(members) == wanted["count"]
        if holds and "color" in wanted:
            holds = all(found.get("color") == wanted["color"] for found in members)
        if holds and "position" in wanted:
            relation, other = wanted["position"]
            targets = matched[other]
            holds = targets is not None and all(
                relation in relations(a["box"], b["box"]) for a, b in product(members, targets)
            )
        matched.append(members if holds else None)
    crowded = any(len(by_class.get(no["class"], [])) >= no["count"] for no in item.get("exclude", ()))
    return None not in matched and not crowded


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """How a box lies to another one: none, one or two of left of, right of, above, below."""
    offset, reduced = [], []
    for axis in (0, 1):
        centre = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
        sizes = abs(box[axis + 2] - box[axis]) + abs(other[axis + 2] - other[axis])
        offset.append(centre)
        reduced.append(math.copysign(max(abs(centre) - 0.1 * sizes, 0), centre))
    if max(map(abs, reduced)) < 1e-3:
        return set()
    # The official script divides the reduced offset by the length of the whole one.
    x, y = (part / math.hypot(*offset) for part in reduced)
    named = {"right of": x, "left of": -x, "below": y, "above": -y}
    return {name for name, share in named.items() if share > 0.5}


def aggregate(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """Mean over pictures of each tag; overall is the mean of the tags."""
    tags = {tag: mean_of(part, "correct") for tag, part in by_name(rows, "tag").items()}
    return [Line("overall", average(list(tags.values()))), *(Line(tag, estimate) for tag, estimate in tags.items())]


GENEVAL = Suite(
    "geneval",
    read,
    lambda item, sample: f"{item['id']}/samples/{sample:05d}.png",
    aggregate,
    requests=requests,
    parse=parse,
    templates={
        DETECTIONS: 'List every object in the picture as JSON: {"objects": [{"class": COCO class, "box": [left, top, '
        'right, bottom] in pixels, "score": confidence from 0 to 1, "color": main colour}]}'
    },
    companions=companions,
    preset="geneval",
    samples=4,
    size=1024,
    data=DATA,
)

"""Editing suites with a model as judge: GEdit, ImgEdit, KRIS, RISE and IntelligentBench.

Layouts, scales and formulas are those of the released scripts, or of the paper where no script was released; where a
script has a defect, `intended` leaves it out (docs/evaluation.md#aggregation). Questions are in our own words.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from megabagel.evaluation.intervals import mean
from megabagel.evaluation.suite import Item, Line, Request, Row, Rule, Suite, average, by_name, distinct, mean_of, need
from megabagel.evaluation.suites.parsing import (
    data_path,
    fill,
    images_of,
    in_range,
    json_in,
    numbers_in,
    records,
)
from megabagel.journal import Record


def _pictures(item: Item, output: Path | str) -> tuple[Path, ...]:
    """The input images, then the edited one."""
    assert isinstance(output, Path)
    return (*map(Path, item["images"]), output)


# GEdit

GEDIT_DATA = "a JSONL export with task_type, key, instruction, instruction_language, input_image (a file beside it)"


def read_gedit(path: Path | None) -> list[Item]:
    """Items of GEdit-Bench."""
    items = []
    for where, record in records(path := data_path(path, GEDIT_DATA)):
        names = ("task_type", "key", "instruction", "instruction_language", "input_image")
        need(record, dict.fromkeys(names, str), where)
        language = record["instruction_language"]
        about = {"tag": record["task_type"], "language": language, "key": record["key"]}
        shown = {"prompt": record["instruction"], "images": images_of(record["input_image"], path.parent, where)}
        kept = {"intersection": bool(record.get("Intersection_exist", False))}
        items.append({"id": f"{language}/{record['key']}", "ability": "edit", **about, **shown, **kept})
    return distinct(items, path)


def _gedit_source(item: Item, record: Record) -> Mapping[str, bytes]:
    name = record["file"].removesuffix(".png")
    return {f"{name}_SRCIMG.png": Path(item["images"][0]).read_bytes()}


def ask_gedit(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """VIEScore: semantic consistency (source and edited picture), perceptual quality (edited picture alone)."""
    both = _pictures(item, output)
    return [
        Request("SC", (fill(templates["SC"], instruction=item["prompt"]), *both)),
        Request("PQ", (templates["PQ"], both[-1])),
    ]


def parse_gedit(item: Item, criterion: str, text: str) -> Record | None:
    """Two numbers from 0 to 10, of which the smaller counts. The released script draws random ones where this fails."""
    answer = json_in(text)
    scores = numbers_in(answer.get("score"), 2, 0, 10) if answer else None
    return None if scores is None else {criterion: min(scores)}


def aggregate_gedit(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """By language: SC, PQ and O = sqrt(SC PQ), means of tasks, then of the tasks' means; also of the intersection."""
    lines = []
    for language, members in by_name(rows, "language").items():
        common = [row for row in members if row.item["intersection"]]
        for subset, part in (("", members), (" intersection", common)):
            tasks = by_name(part, "tag").values()
            for name in ("SC", "PQ"):
                lines.append(Line(f"{language}{subset} {name}", average([mean_of(task, name) for task in tasks])))
            overall = [mean([math.sqrt(row.scores["SC"] * row.scores["PQ"]) for row in task]) for task in tasks]
            lines.append(Line(f"{language}{subset} O", average(overall)))
    return [line for line in lines if line.estimate]


GEDIT = Suite(
    "gedit",
    read_gedit,
    lambda item, sample: f"fullset/{item['tag']}/{item['language']}/{item['key']}.png",
    aggregate_gedit,
    requests=ask_gedit,
    parse=parse_gedit,
    templates={
        "SC": "The first picture was edited into the second one by this instruction: {instruction}\nGive two numbers "
        "from 0 to 10: how fully the instruction was carried out, and how little else was changed (10: nothing). "
        'Answer as JSON: {"score": [N, N], "reasoning": text}',
        "PQ": "Give two numbers from 0 to 10: how natural the picture looks, and how free it is of artefacts. "
        'Answer as JSON: {"score": [N, N], "reasoning": text}',
    },
    companions=_gedit_source,
    preset="gedit",
    seed=42,
    data=GEDIT_DATA,
)

# ImgEdit

IMGEDIT_DATA = "singleturn.json of ImgEdit: {key: {id, prompt, edit_type}}, with the images beside it"


def read_imgedit(path: Path | None) -> list[Item]:
    """Items of ImgEdit's single-turn benchmark."""
    items = []
    for where, record in records(path := data_path(path, IMGEDIT_DATA)):
        need(record, dict.fromkeys(("key", "id", "prompt", "edit_type"), str), where)
        about = {"tag": record["edit_type"], "prompt": record["prompt"]}
        shown = images_of(record["id"], path.parent, where)
        items.append({"id": record["key"], "ability": "edit", **about, "images": shown})
    return distinct(items, path)


def ask_imgedit(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """One question with both pictures; `--templates` may hold the official text of each edit type."""
    template = templates.get(item["tag"]) or templates["edit"]
    text = fill(template.replace("<edit_prompt>", "{instruction}"), instruction=item["prompt"], kind=item["tag"])
    return [Request("edit", (text, *_pictures(item, output)))]


def parse_imgedit(item: Item, criterion: str, text: str) -> Record | None:
    """Three lines `name: digit` of 1 to 5; their mean, to two decimals."""
    found = re.findall(r"^[^\n:]{1,60}:\s*\**(\d+)\**\s*$", text, re.MULTILINE)
    scores = numbers_in([int(number) for number in found], 3, 1, 5)
    return None if scores is None else {"score": round(fmean(scores), 2)}


def aggregate_imgedit(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """Mean of each edit type; overall is the mean over items."""
    tags = by_name(rows, "tag").items()
    return [Line("overall", mean_of(rows, "score")), *(Line(tag, mean_of(part, "score")) for tag, part in tags)]


IMGEDIT_TYPES = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
IMGEDIT = Suite(
    "imgedit",
    read_imgedit,
    lambda item, sample: f"{item['id']}.png",
    aggregate_imgedit,
    requests=ask_imgedit,
    parse=parse_imgedit,
    templates={
        "edit": "The first picture was edited into the second one ({kind}) by this instruction: {instruction}\nGive "
        "whole numbers from 1 to 5 in three lines:\nInstruction followed: N\nRest preserved: N\nVisual quality: N",
        **dict.fromkeys(IMGEDIT_TYPES, ""),
    },
    preset="imgedit",
    data=IMGEDIT_DATA,
)

# KRIS

KRIS_DATA = "a JSON list with id, type, ori_img, ins_en, explain_en, with the images in a folder per type beside it"
KRIS_META = {
    "Factual": (
        "color_change count_change part_completion size_adjustment anomaly_correction position_movement "
        "viewpoint_change temporal_prediction"
    ),
    "Conceptual": "humanities practical_knowledge biology chemistry geography mathematics medicine physics",
    "Procedural": "abstract_reasoning rule-based_reasoning multi-element_synthesis multi-instruction_execution",
}
"""Types of edits by kind of knowledge; a type of another name is its own kind."""


def read_kris(path: Path | None) -> list[Item]:
    """Items of KRIS-Bench."""
    items = []
    for where, record in records(path := data_path(path, KRIS_DATA)):
        need(record, {"id": (int, str), "type": str, "ori_img": (str, list), "ins_en": str}, where)
        kind = record["type"]
        names = [record["ori_img"]] if isinstance(record["ori_img"], str) else record["ori_img"]
        folder = path.parent / kind if (path.parent / kind).is_dir() else path.parent
        about = {"tag": kind, "prompt": record["ins_en"], "explanation": record.get("explain_en") or ""}
        shown = images_of(names, folder, where)
        items.append({"id": f"{kind}/{record['id']}", "ability": "edit", **about, "images": shown})
    return distinct(items, path)


def ask_kris(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """Consistency, instruction and quality; with an explanation, instruction and knowledge in one question."""
    both = _pictures(item, output)
    words = {"instruction": item["prompt"], "explanation": item["explanation"]}
    second = "instruction and knowledge" if item["explanation"] else "instruction"
    return [
        Request("consistency", (fill(templates["consistency"], **words), *both)),
        Request(second, (fill(templates[second], **words), *both)),
        Request("quality", (templates["quality"], both[-1])),
    ]


_KRIS_NAMES = {
    "consistency": ("VC",),
    "quality": ("VQ",),
    "instruction": ("IF",),
    "instruction and knowledge": ("IF", "KP"),
}


def parse_kris(item: Item, criterion: str, text: str) -> Record | None:
    """Whole numbers from 1 to 5, as 25 (x - 1)."""
    names, answer = _KRIS_NAMES[criterion], json_in(text) or {}
    keys = {"IF": "instruction_score", "KP": "knowledge_score"} if len(names) == 2 else {names[0]: "score"}
    scores = {name: in_range(answer.get(keys[name]), 1, 5) for name in names}
    if None in scores.values():
        return None
    return {name: 25 * (score - 1) for name, score in scores.items() if score is not None}


def aggregate_kris(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """Flat means over all single scores: of everything, of each kind of knowledge, each type, and each criterion."""

    def flat(part: Sequence[Row], names: Sequence[str] = ("VC", "VQ", "IF", "KP")) -> list[float]:
        return [row.scores[name] for row in part for name in names if name in row.scores]

    kind_of = {kind: meta for meta, kinds in KRIS_META.items() for kind in kinds.split()}
    metas: dict[str, list[Row]] = {}
    for row in rows:
        metas.setdefault(kind_of.get(str(row.item["tag"]), str(row.item["tag"])), []).append(row)
    lines = [Line("overall", mean(flat(rows)))]
    lines += [Line(meta, mean(flat(part))) for meta, part in metas.items()]
    lines += [Line(f"type {tag}", mean(flat(part))) for tag, part in by_name(rows, "tag").items()]
    return [
        *lines,
        *(Line(name, mean(flat(rows, (name,)))) for name in ("VC", "VQ", "IF", "KP") if flat(rows, (name,))),
    ]


_KRIS_ONE = ' Answer as JSON: {"score": N, "reasoning": text}'
KRIS = Suite(
    "kris",
    read_kris,
    lambda item, sample: f"{item['id']}.png",
    aggregate_kris,
    requests=ask_kris,
    parse=parse_kris,
    templates={
        "consistency": "The last picture is an edit of those before by: {instruction}\nFrom 1 to 5, how well was "
        "everything kept that the instruction leaves alone?" + _KRIS_ONE,
        "instruction": "The last picture is an edit of those before by: {instruction}\nFrom 1 to 5, how fully was the "
        "instruction carried out?" + _KRIS_ONE,
        "instruction and knowledge": "The last picture is an edit of those before by: {instruction}\nWhat should "
        "result: {explanation}\nGive whole numbers from 1 to 5: how fully the instruction was carried out, and how "
        'right the result is by that knowledge. Answer as JSON: {"instruction_score": N, "knowledge_score": N}',
        "quality": "From 1 to 5, how good and free of artefacts is the picture?" + _KRIS_ONE,
    },
    preset="kris",
    think=True,
    data=KRIS_DATA,
)

# IntelligentBench

INTELLIGENT_DATA = "a JSON list with id, image, text and answer_image, with the images beside it"


def read_intelligent(path: Path | None) -> list[Item]:
    """Items of IntelligentBench; no official file was released, so the fields are ours."""
    items = []
    for where, record in records(path := data_path(path, INTELLIGENT_DATA)):
        need(record, {"id": (int, str), "image": (str, list), "text": str, "answer_image": str}, where)
        shown = images_of(record["image"], path.parent, where)
        (answer,) = images_of(record["answer_image"], path.parent, where)
        about = {"tag": "all", "prompt": record["text"], "answer_image": answer}
        items.append({"id": str(record["id"]), "ability": "edit", **about, "images": shown})
    return distinct(items, path)


def ask_intelligent(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """One question: input, instruction, a person's answer, the model's (BAGEL section 7.3)."""
    *shown, made = _pictures(item, output)
    parts: tuple[str | Path, ...] = (
        "Input:",
        *shown,
        fill(templates["answer"], instruction=item["prompt"]),
        "Reference:",
    )
    return [Request("answer", (*parts, Path(item["answer_image"]), "Answer to judge:", made))]


def parse_intelligent(item: Item, criterion: str, text: str) -> Record | None:
    """0, 1 or 2."""
    score = in_range((json_in(text) or {}).get("score"), 0, 2)
    return None if score not in (0, 1, 2) else {"score": score / 2}


INTELLIGENT = Suite(
    "intelligentbench",
    read_intelligent,
    lambda item, sample: f"{item['id']}.png",
    lambda rows, rule: [Line("overall", mean_of(rows, "score"), 100)],
    requests=ask_intelligent,
    parse=parse_intelligent,
    templates={
        "answer": "Instruction: {instruction}\nJudge the last picture as an answer, given a person's reference: was "
        "the request fulfilled, is the rest consistent with the input, is it creative and sound? Give 0 (wrong), "
        '1 (partly) or 2 (right). Answer as JSON: {"score": N, "reason_of_score": text}'
    },
    preset="edit",
    data=INTELLIGENT_DATA,
)

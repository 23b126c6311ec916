"""Text-to-image suites with a model as judge: WISE, T2I-CompBench and T2I-ReasonBench.

Layouts, scales and formulas are those of the released scripts (docs/evaluation.md#suites); the questions to the judge
are in our own words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from megabagel.errors import UserError
from megabagel.evaluation.intervals import Estimate, mean
from megabagel.evaluation.suite import Item, Line, Request, Row, Rule, Suite, average, by_name, distinct, mean_of, need
from megabagel.evaluation.suites.parsing import data_path, fill, in_range, json_in, named_number, numbers_in, records
from megabagel.journal import Record

# WISE

WISE_DATA = "a JSON list with Prompt, Explanation, Category, Subcategory and prompt_id, as WISE's merged file"
WISE_NAMES = ("Consistency", "Realism", "Aesthetic Quality")
WISE_WEIGHTS = {"Cultural": 0.4, "Time": 0.167, "Space": 0.133, "Biology": 0.1, "Physics": 0.1, "Chemistry": 0.1}
"""Of the groups, in WISE's own script."""
_TIMES = ("longitudinal time", "horizontal time")


def read_wise(path: Path | None) -> list[Item]:
    """Items of WISE."""
    items = []
    for where, record in records(path := data_path(path, WISE_DATA)):
        need(record, {"Prompt": str, "Explanation": str, "Subcategory": str, "prompt_id": int}, where)
        tag = wise_group(record["prompt_id"], record["Subcategory"], where)
        about = {"explanation": record["Explanation"], "tag": tag}
        items.append({"id": str(record["prompt_id"]), "ability": "draw", "prompt": record["Prompt"], **about})
    return distinct(items, path)


def wise_group(number: int, subcategory: str, where: str = "") -> str:
    """Group of a prompt: by its number, and between time and space by its subcategory."""
    if not 1 <= number <= 1000:
        raise UserError(f"{where}: prompt_id = {number}; expected 1 to 1000")
    if number <= 400:
        return "Cultural"
    if number <= 700:
        return "Time" if subcategory.lower() in _TIMES else "Space"
    return ("Biology", "Physics", "Chemistry")[(number - 701) // 100]


def ask_wise(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """One question with one picture."""
    assert isinstance(output, Path)
    text = fill(templates["wise"], prompt=item["prompt"], explanation=item["explanation"])
    return [Request("wise", (text, output), max_tokens=2000)]


def parse_wise(item: Item, criterion: str, text: str) -> Record | None:
    """Three scores of 0, 1 or 2; WiScore weighs them 0.7, 0.2 and 0.1."""
    scores = [named_number(text, name, 0, 2) for name in WISE_NAMES]
    if None in scores:
        return None
    consistency, realism, beauty = (score for score in scores if score is not None)
    return {
        "consistency": consistency,
        "realism": realism,
        "aesthetic": beauty,
        "wiscore": (0.7 * consistency + 0.2 * realism + 0.1 * beauty) / 2,
    }


def aggregate_wise(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """WiScore of the groups. Overall: `published`, their plain mean, as BAGEL's number; `intended`, WISE's weights."""
    groups = {name: mean_of(part, "wiscore") for name, part in by_name(rows, "tag").items()}
    overall = average(list(groups.values()))
    known = {name: estimate for name, estimate in groups.items() if estimate is not None}
    if rule == "intended" and known:
        weights = {name: WISE_WEIGHTS[name] / sum(map(WISE_WEIGHTS.__getitem__, known)) for name in known}
        value = sum(weights[name] * estimate.value for name, estimate in known.items())
        half = sum((weights[name] * (estimate.high - estimate.value)) ** 2 for name, estimate in known.items()) ** 0.5
        overall = Estimate(value, value - half, value + half, len(rows))
    return [Line("overall", overall), *(Line(name, groups.get(name)) for name in WISE_WEIGHTS)]


def _thought(item: Item, record: Record) -> Mapping[str, bytes]:
    return {f"{item['id']}.txt": record["thought"].encode()} if record.get("thought") else {}


WISE = Suite(
    "wise",
    read_wise,
    lambda item, sample: f"{item['id']}.png",
    aggregate_wise,
    requests=ask_wise,
    parse=parse_wise,
    templates={
        "wise": "Judge a generated picture.\nPrompt: {prompt}\nWhat the prompt means: {explanation}\n"
        "Give whole numbers from 0 (not at all) over 1 (partly) to 2 (fully) for three properties: whether the picture "
        "shows what the prompt means, whether it is physically and logically real, and its aesthetic quality.\nAnswer "
        "in three lines:\nConsistency: N\nRealism: N\nAesthetic Quality: N"
    },
    companions=_thought,
    preset="wise",
    size=1024,
    data=WISE_DATA,
    rules=("published", "intended"),
)

# T2I-CompBench

COMPBENCH_DATA = "a folder with color_val.txt, shape_val.txt, ... or a JSON list with Question, Category, Question_id"
CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial")
COMPLEX = ("complex", "complex_action", "complex_spatial")


def read_compbench(path: Path | None) -> list[Item]:
    """Items of T2I-CompBench(++): prompts by line, or the JSON list that SRUM's evaluation reads."""
    path = data_path(path, COMPBENCH_DATA)
    items: list[Item] = []
    if path.is_file():
        for where, record in records(path):
            need(record, {"Question": str, "Category": str, "Question_id": (int, str)}, where)
            tag, number = record["Category"], record["Question_id"]
            items.append({"id": f"{tag}/{number}", "number": number, "tag": tag, "prompt": record["Question"]})
    else:
        for tag in (*CATEGORIES, *COMPLEX):
            file = path / f"{tag}_val.txt"
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            prompts = [line.strip() for line in lines if line.strip()]
            items += [{"id": f"{tag}/{n}", "number": n, "tag": tag, "prompt": p} for n, p in enumerate(prompts)]
    unknown = {item["tag"] for item in items} - {*CATEGORIES, *COMPLEX}
    if unknown:
        raise UserError(f"{path}: category {sorted(unknown)[0]!r}; expected {', '.join((*CATEGORIES, *COMPLEX))}")
    return distinct([{**item, "ability": "draw"} for item in items], path)


def compbench_file(item: Item, sample: int) -> str:
    """`{category}/samples/{prompt}_{index}.png`: the official scorers take the prompt from the name."""
    name = item["prompt"].rstrip(".").replace("/", " ")
    number = item["number"] * 10 + sample if isinstance(item["number"], int) else sample
    return f"{item['tag']}/samples/{name}_{number:06d}.png"


def ask_compbench(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """One question for all categories, as SRUM's judge."""
    assert isinstance(output, Path)
    return [Request("alignment", (output, fill(templates["alignment"], prompt=item["prompt"])), max_tokens=512)]


def parse_compbench(item: Item, criterion: str, text: str) -> Record | None:
    """A score from 0 to 100."""
    answer = json_in(text)
    score = in_range(answer.get("score"), 0, 100) if answer else None
    return None if score is None else {"score": score}


def aggregate_compbench(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """Means of categories; the composite is the mean of the three complex ones.

    Overall of eight columns: `published` divides by eight whatever is there; `intended` by the number that is there.
    """
    groups = {name: mean_of(part, "score") for name, part in by_name(rows, "tag").items()}
    composite = average([groups.get(name) for name in COMPLEX])
    columns = [*(groups.get(name) for name in CATEGORIES), composite]
    overall = average(columns)
    if overall is not None and rule == "published":
        share = sum(column is not None for column in columns) / len(columns)
        overall = Estimate(share * overall.value, share * overall.low, share * overall.high, overall.count)
    lines = [Line("overall", overall), *(Line(name, groups.get(name)) for name in (*CATEGORIES, *COMPLEX))]
    return [*lines, Line("complex composite", composite)]


COMPBENCH = Suite(
    "t2i-compbench",
    read_compbench,
    compbench_file,
    aggregate_compbench,
    requests=ask_compbench,
    parse=parse_compbench,
    templates={
        "alignment": 'How well does the picture show "{prompt}"? Look at objects, attributes, numbers, positions and '
        "actions. Give a whole number from 0 (nothing of it) to 100 (all of it, and nothing wrong). Answer as JSON: "
        '{"score": N, "explanation": at most 20 words}'
    },
    preset="notebook",
    samples=10,
    seed=42,
    data=COMPBENCH_DATA,
    rules=("published", "intended"),
)

# T2I-ReasonBench

REASON_DATA = "a folder with the four evaluation_*.json question files of T2I-ReasonBench"
REASON_SETS = {
    "idiom": {"reason_evaluation": 1.0},
    "textual_image": {"reason_evaluation": 1.0},
    "entity": {"entity_evaluation": 0.7, "other_details_evaluation": 0.3},
    "scientific": {"scientific_evaluation": 0.7, "other_details_evaluation": 0.3},
}
"""Blocks of questions behind an image's accuracy, with their weights."""
QUALITY = "quality_evaluation"


def read_reason(path: Path | None) -> list[Item]:
    """Items of the four sets, each with its blocks of questions."""
    path = data_path(path, REASON_DATA)
    items = []
    for tag, weights in REASON_SETS.items():
        files = sorted(path.glob(f"evaluation_{tag.split('_')[0]}*.json"))
        for where, record in records(files[0]) if files else []:
            blocks = (*weights, QUALITY)
            need(record, {"id": (int, str), "prompt": str, **dict.fromkeys(blocks, dict)}, where)
            # Keys vary in a few blocks (q1, prefixed names), so a block is passed to the judge as it is.
            questions = {name: record[name] for name in blocks}
            number = f"{int(record['id']):04d}"
            about = {"number": number, "tag": tag, "prompt": record["prompt"], "questions": questions}
            items.append({"id": f"{tag}/{number}", "ability": "draw", **about})
    return distinct(items, path)


def count_questions(block: Mapping[str, object]) -> int:
    """Questions of a block: its keys that are no criteria (c1, ...) and not `scoring`."""
    return sum(not name.rpartition("_")[2].startswith("c") and name != "scoring" for name in block)


def ask_reason(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """A question per block; the prompt itself is not shown, as in the official script."""
    assert isinstance(output, Path)
    return [
        Request(name, (output, fill(templates["block"], questions=block))) for name, block in item["questions"].items()
    ]


def parse_reason(item: Item, criterion: str, text: str) -> Record | None:
    """One of 0, 0.5 and 1 for each question of the block."""
    answer = json_in(text)
    count = count_questions(item["questions"][criterion])
    scores = numbers_in(answer.get("score"), count, 0, 1) if answer and count else None
    if scores is None or any(score not in (0, 0.5, 1) for score in scores):
        return None
    return {criterion: fmean(scores)}


def aggregate_reason(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """Accuracy and quality of each set, times 100, and their means over the sets."""
    lines, totals = [], {"accuracy": [], "quality": []}  # type: ignore[var-annotated]
    for tag, part in by_name(rows, "tag").items():
        weights = REASON_SETS[tag]
        accuracy = mean([sum(weight * row.scores[name] for name, weight in weights.items()) for row in part])
        for name, estimate in (("accuracy", accuracy), ("quality", mean_of(part, QUALITY))):
            totals[name].append(estimate)
            lines.append(Line(f"{tag}: {name}", estimate, 100))
    return [*(Line(f"mean: {name}", average(parts), 100) for name, parts in totals.items()), *lines]


REASONBENCH = Suite(
    "t2i-reasonbench",
    read_reason,
    lambda item, sample: f"{item['tag']}/{item['number']}.png",
    aggregate_reason,
    requests=ask_reason,
    parse=parse_reason,
    templates={
        "block": "Answer each question about the picture by its criteria with 1, 0.5 or 0.\n{questions}\nAnswer as "
        'JSON with the scores in the order of the questions: {"reason": text, "score": [N, ...]}'
    },
    preset="notebook",
    data=REASON_DATA,
)

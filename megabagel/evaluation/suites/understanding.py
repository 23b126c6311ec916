"""Understanding suites: MME, MMBench, MMMU, MMVP by rules, MathVista by rules after extraction, MM-Vet by a judge.

Answers are scored as in the released scripts (docs/evaluation.md#suites), and written in the files that the official
scorers and servers take. Images embedded in a file (base64) stay in the item.
"""

import base64
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megabagel.errors import UserError
from megabagel.evaluation.intervals import Estimate, mean, proportion
from megabagel.evaluation.suite import Item, Line, Request, Row, Rule, Suite, by_name, distinct, mean_of, need
from megabagel.evaluation.suites.parsing import data_path, fill, images_of, in_range, named_number, records
from megabagel.journal import Record, write_json, write_whole

DIRECTLY = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"


def _none(item: Item, sample: int) -> str:
    raise AssertionError("questions have no pictures")


def inputs(item: Item, size: int) -> list[Any]:
    """Files, or the bytes of images inside the benchmark's file."""
    return [*map(Path, item.get("images", ())), *map(base64.b64decode, item.get("embedded", ()))]


def choices(question: str, options: Sequence[str], hint: str = "") -> str:
    """A multiple-choice question as the released scripts put it."""
    lines = [hint] if hint else []
    lines += [question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)), DIRECTLY]
    return "\n".join(lines)


def chosen(reply: str, options: Sequence[str]) -> str | None:
    """The letter of an answer: a letter by itself, or the one option whose text it contains."""
    text = reply.strip()
    if found := re.match(r"\(?([A-J])\)?(?:[.:,\s]|$)", text):
        return found[1] if LETTERS.index(found[1]) < len(options) else None
    named = [LETTERS[n] for n, option in enumerate(options) if option and option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def exact_choice(item: Item, output: Path | str) -> Record:
    """Whether the chosen letter is the answer; an answer that names no option is wrong, as in the official scripts."""
    letter = chosen(str(output), item["options"])
    return {"correct": letter == item["answer"], "chosen": letter}


def _accuracy(rows: Sequence[Row], rule: Rule) -> list[Line]:
    tags = by_name(rows, "tag").items()
    lines = [Line("accuracy", mean_of(rows, "correct"), 100)]
    return [*lines, *(Line(tag, mean_of(part, "correct"), 100) for tag, part in tags if tag)]


# MME

MME_DATA = "a folder with a tab-separated file per task (image, question, answer) and a folder of images per task"
PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
WORD_OR_PHRASE = " Answer the question using a single word or phrase."


def read_mme(path: Path | None) -> list[Item]:
    """Items of MME; lines come in pairs, a yes and a no about one image."""
    path, items = data_path(path, MME_DATA), []
    for task in (*PERCEPTION, *COGNITION):
        file = path / f"{task}.txt"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        for number, line in enumerate(filter(str.strip, lines)):
            parts = line.split("\t")
            if len(parts) < 3 or parts[2].strip() not in ("Yes", "No"):
                raise UserError(f"{file}, line {number + 1}: {line!r:.60}; expected image, question, Yes or No")
            shown = images_of(parts[0], path / task if (path / task).is_dir() else path, str(file))
            about = {"tag": task, "image": parts[0], "question": parts[1], "answer": parts[2].strip().lower()}
            prompt = parts[1].removesuffix(WORD_OR_PHRASE) + WORD_OR_PHRASE
            items.append({"id": f"{task}/{number}", "ability": "ask", **about, "prompt": prompt, "images": shown})
    return distinct(items, path)


def exact_mme(item: Item, output: Path | str) -> Record:
    """Yes or no among the first four characters."""
    start = str(output).strip().lower()[:4]
    said = "yes" if "yes" in start else "no" if "no" in start else "other"
    return {"correct": said == item["answer"], "said": said}


def aggregate_mme(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """Per task 100 acc + 100 acc+ (both questions about an image right); perception and cognition are sums of tasks."""
    lines, sums = [], dict.fromkeys(("perception", "cognition"), 0.0)
    for task, part in by_name(rows, "tag").items():
        images = [all(row.scores["correct"] for row in pair) for pair in by_name(part, "image").values()]
        acc, plus = mean_of(part, "correct"), proportion(sum(images), len(images))
        assert acc is not None and plus is not None
        value = 100 * (acc.value + plus.value)
        sums["perception" if task in PERCEPTION else "cognition"] += value
        ends = (100 * (acc.low + plus.low), 100 * (acc.high + plus.high))
        lines.append(Line(task, Estimate(value, *ends, len(part))))
    totals = {**sums, "sum": sum(sums.values())}
    return [*(Line(name, Estimate(x, x, x, len(rows))) for name, x in totals.items()), *lines]


def export_mme(rows: Sequence[Row], out: Path) -> None:
    """A file per task with image, question, ground truth and answer, tab-separated."""
    for task, part in by_name(rows, "tag").items():
        cells = [
            (r.item["image"], r.item["question"], r.item["answer"].title(), " ".join((r.text or "").split()))
            for r in part
        ]
        write_whole(out / "answers" / f"{task}.txt", "".join("\t".join(line) + "\n" for line in cells))


MME = Suite(
    "mme", read_mme, _none, aggregate_mme, exact=exact_mme, export=export_mme, inputs=inputs, max_new_tokens=20,
    data=MME_DATA,
)  # fmt: skip

# MMBench

MMBENCH_DATA = "mmbench_*.tsv with index, question, hint, A, B, ..., answer, category, image (base64)"


def read_mmbench(path: Path | None) -> list[Item]:
    """Items of MMBench."""
    items = []
    for where, record in records(path := data_path(path, MMBENCH_DATA)):
        need(record, {"index": str, "question": str, "image": str, "A": str}, where)
        options = [record[letter] for letter in "ABCDE" if record.get(letter) not in (None, "", "nan")]
        hint = record.get("hint") or ""
        prompt = choices(record["question"], options, "" if hint == "nan" else hint)
        about = {"tag": record.get("category") or "", "answer": record.get("answer") or "", "options": options}
        items.append(
            {"id": record["index"], "ability": "ask", **about, "prompt": prompt, "embedded": [record["image"]]}
        )
    return distinct(items, path)


def export_mmbench(rows: Sequence[Row], out: Path) -> None:
    """A table with `prediction`, for the server: CSV, which it takes beside xlsx."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("index", "prediction", "text"))
    table.writerows((row.item["id"], chosen(row.text or "", row.item["options"]) or "", row.text) for row in rows)
    write_whole(out / "answers" / "mmbench.csv", text.getvalue())


MMBENCH = Suite(
    "mmbench", read_mmbench, _none, _accuracy, exact=exact_choice, export=export_mmbench, inputs=inputs,
    max_new_tokens=100, data=MMBENCH_DATA,
)  # fmt: skip

# MMMU

MMMU_DATA = "a JSONL export of the validation set: id, question, options, answer, question_type, images, subfield"


def read_mmmu(path: Path | None) -> list[Item]:
    """Items of MMMU; `<image 1>` marks in the question stay, images come first."""
    items = []
    for where, record in records(path := data_path(path, MMMU_DATA)):
        need(record, {"id": str, "question": str, "options": list, "answer": str, "images": list}, where)
        options = list(map(str, record["options"]))
        prompt = choices(record["question"], options) if options else record["question"] + "\n" + WORD_OR_PHRASE.strip()
        about = {"tag": record["id"].split("_")[1] if record["id"].count("_") > 1 else "", "answer": record["answer"]}
        shown = images_of(record["images"], path.parent, where)
        items.append(
            {"id": record["id"], "ability": "ask", **about, "options": options, "prompt": prompt, "images": shown}
        )
    return distinct(items, path)


def exact_mmmu(item: Item, output: Path | str) -> Record:
    """The letter, or for open questions the answer inside the reply, by number where it is one."""
    if item["options"]:
        return exact_choice(item, output)
    reply, wanted = str(output).strip().lower(), item["answer"].strip().lower()
    number = in_range(wanted.replace(",", ""), -1e18, 1e18)
    if number is None:
        return {"correct": bool(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", reply))}
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", reply)
    return {"correct": any(round(float(text.replace(",", "")), 2) == round(number, 2) for text in found)}


def export_mmmu(rows: Sequence[Row], out: Path) -> None:
    """prediction.json {id: answer} and answer_dict_val.json."""
    pairs = {row.item["id"]: row.text or "" for row in rows}
    letters = {row.item["id"]: chosen(row.text or "", row.item["options"]) or row.text for row in rows}
    write_json(out / "answers" / "prediction.json", {name: letters[name] for name in pairs})
    kinds = {row.item["id"]: "multiple-choice" if row.item["options"] else "short-answer" for row in rows}
    truth = {
        row.item["id"]: {"question_type": kinds[row.item["id"]], "ground_truth": row.item["answer"]} for row in rows
    }
    write_json(out / "answers" / "answer_dict_val.json", truth)


MMMU = Suite(
    "mmmu", read_mmmu, _none, _accuracy, exact=exact_mmmu, export=export_mmmu, inputs=inputs, max_new_tokens=10,
    data=MMMU_DATA,
)  # fmt: skip

# MM-Vet

MMVET_DATA = "mm-vet.json of MM-Vet: {v1_0: {imagename, question, answer, capability}}, with images/ beside it"


def read_mmvet(path: Path | None) -> list[Item]:
    """Items of MM-Vet."""
    items = []
    for where, record in records(path := data_path(path, MMVET_DATA)):
        need(record, {"key": str, "imagename": str, "question": str, "answer": str}, where)
        folder = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
        about = {"tag": "+".join(record.get("capability") or []), "answer": record["answer"]}
        shown = {"prompt": record["question"], "images": images_of(record["imagename"], folder, where)}
        items.append({"id": record["key"], "ability": "ask", **about, **shown})
    return distinct(items, path)


def ask_mmvet(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """One question of text alone: ground truth against prediction."""
    text = fill(templates["correctness"], question=item["prompt"], answer=item["answer"], prediction=output)
    return [Request("correctness", (text,), max_tokens=100)]


def parse_mmvet(item: Item, criterion: str, text: str) -> Record | None:
    """A number from 0 to 1, alone or after `Correctness:`."""
    score = in_range(text.strip().splitlines()[0] if text.strip() else None, 0, 1)
    score = score if score is not None else named_number(text, "Correctness", 0, 1)
    return None if score is None else {"correct": score}


def export_mmvet(rows: Sequence[Row], out: Path) -> None:
    """results.json {v1_i: answer}, for the server."""
    write_json(out / "answers" / "results.json", {row.item["id"]: row.text for row in rows})


MMVET = Suite(
    "mm-vet", read_mmvet, _none, _accuracy, requests=ask_mmvet, parse=parse_mmvet, export=export_mmvet, inputs=inputs,
    templates={
        "correctness": "Question: {question}\nGround truth (<AND> joins parts that are all needed, <OR> alternatives): "
        "{answer}\nPrediction: {prediction}\nHow right is the prediction, from 0.0 to 1.0 in tenths? Answer with the "
        "number alone."
    },
    data=MMVET_DATA,
)  # fmt: skip

# MathVista

MATHVISTA_DATA = "a JSONL export of testmini: pid, query, image, answer, question_type, answer_type, choices, precision"


def read_mathvista(path: Path | None) -> list[Item]:
    """Items of MathVista."""
    items = []
    for where, record in records(path := data_path(path, MATHVISTA_DATA)):
        need(record, {"pid": str, "query": str, "image": str, "answer": str, "answer_type": str}, where)
        names = ("answer_type", "question_type", "choices", "precision")
        about = {"tag": (record.get("metadata") or {}).get("task", ""), "answer": record["answer"]}
        shown = {"prompt": record["query"], "images": images_of(record["image"], path.parent, where)}
        items.append({"id": record["pid"], "ability": "ask", **about, **{n: record.get(n) for n in names}, **shown})
    return distinct(items, path)


def ask_mathvista(item: Item, output: Path | str, templates: Mapping[str, str]) -> list[Request]:
    """Extraction of the short answer from the reply."""
    text = fill(templates["extraction"], question=item["prompt"], reply=output)
    return [Request("extraction", (text,), max_tokens=100)]


def parse_mathvista(item: Item, criterion: str, text: str) -> Record | None:
    """The extracted answer, normalised by its type, equals the right one; of choices the nearest by edit distance."""
    extracted = text.strip()
    if not extracted:
        return None
    options = item.get("choices")
    if options:
        letter = re.fullmatch(r"\(?([A-J])\)?\.?", extracted)
        if letter and LETTERS.index(letter[1]) < len(options):
            return {"correct": options[LETTERS.index(letter[1])] == item["answer"]}
        return {"correct": min(options, key=lambda option: edit_distance(option, extracted)) == item["answer"]}
    if item["answer_type"] in ("integer", "float"):
        number, wanted = (in_range(x.replace(",", ""), -1e18, 1e18) for x in (extracted, item["answer"]))
        digits = int(item.get("precision") or 0) if item["answer_type"] == "float" else 0
        near = number is not None and wanted is not None and round(number, digits) == round(wanted, digits)
        whole = number is not None and item["answer_type"] == "integer" and int(number) == wanted
        return {"correct": near if item["answer_type"] == "float" else whole}
    return {"correct": extracted == item["answer"]}


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        row, before = [i], row
        for j, b in enumerate(second, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def export_mathvista(rows: Sequence[Row], out: Path) -> None:
    """results.json {pid: {query, response}}."""
    found = {row.item["id"]: {"query": row.item["prompt"], "response": row.text} for row in rows}
    write_json(out / "answers" / "results.json", found)


MATHVISTA = Suite(
    "mathvista", read_mathvista, _none, _accuracy, requests=ask_mathvista, parse=parse_mathvista,
    export=export_mathvista, inputs=inputs, max_new_tokens=4096,
    templates={
        "extraction": "Question: {question}\nReply: {reply}\nRepeat the final answer of the reply alone: the option's "
        "letter, the number, or the list."
    },
    data=MATHVISTA_DATA,
)  # fmt: skip

# MMVP

MMVP_DATA = "Questions.csv of MMVP (Index, Question, Options, Correct Answer), with its images beside it"


def read_mmvp(path: Path | None) -> list[Item]:
    """Items of MMVP; questions 1 and 2, 3 and 4, ... are pairs."""
    items = []
    for where, record in records(path := data_path(path, MMVP_DATA)):
        need(record, {"Index": str, "Question": str, "Options": str, "Correct Answer": str}, where)
        number = int(record["Index"])
        options = [text.strip() for text in re.split(r"\([a-z]\)", record["Options"]) if text.strip()]
        answer = record["Correct Answer"].strip("() ").upper()
        folder = next((f for f in (path.parent / "MMVP Images", path.parent / "images") if f.is_dir()), path.parent)
        about = {"tag": "", "pair": (number - 1) // 2, "options": options, "answer": answer}
        shown = {"prompt": choices(record["Question"], options), "images": images_of(f"{number}.jpg", folder, where)}
        items.append({"id": str(number), "ability": "ask", **about, **shown})
    return distinct(items, path)


def aggregate_mmvp(rows: Sequence[Row], rule: Rule) -> list[Line]:
    """Share of pairs with both right; single answers beside it."""
    pairs = [[row.scores["correct"] for row in part] for part in by_name(rows, "pair").values()]
    whole = [all(pair) for pair in pairs if len(pair) == 2]
    single = mean([float(row.scores["correct"]) for row in rows])
    return [Line("pairs", proportion(sum(whole), len(whole)), 100), Line("single answers", single, 100)]


def export_mmvp(rows: Sequence[Row], out: Path) -> None:
    """results.jsonl {question_id, prompt, answer, response}."""
    lines = (
        {"question_id": r.item["id"], "prompt": r.item["prompt"], "answer": r.item["answer"], "response": r.text}
        for r in rows
    )
    write_whole(out / "answers" / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


MMVP = Suite(
    "mmvp", read_mmvp, _none, aggregate_mmvp, exact=exact_choice, export=export_mmvp, inputs=inputs,
    max_new_tokens=100, data=MMVP_DATA,
)  # fmt: skip

"""Suites on made-up files: layouts read and written, answers parsed, aggregates against numbers worked out by hand."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megabagel.errors import UserError
from megabagel.evaluation.suite import Item, Row, Rule
from megabagel.evaluation.suites import geneval
from megabagel.evaluation.suites.registry import SUITES, suite_of
from megabagel.evaluation.suites.understanding import chosen, edit_distance


def rows(name: str, *parts: tuple[Item, dict[str, Any]]) -> dict[Rule, dict[str, float]]:
    """Values of the suite's table, by rule and line, of items with these scores."""
    made = [Row({"id": str(n), "tag": "", **item}, 0, scores) for n, (item, scores) in enumerate(parts)]
    suite = suite_of(name)
    return {
        rule: {line.name: line.estimate.value * line.scale for line in suite.aggregate(made, rule) if line.estimate}
        for rule in ("published", "intended")
    }


def files(folder: Path, content: dict[str, Any]) -> Path:
    """Write texts, JSON values and, for None, small pictures; returns the folder."""
    for name, value in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            Image.new("RGB", (8, 8), "red").save(path)
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# Aggregates, worked out by hand


def test_geneval_is_the_mean_of_its_tags() -> None:
    tag = lambda name, *values: [({"tag": name}, {"correct": value}) for value in values]  # noqa: E731
    found = rows("geneval", *tag("counting", 1, 0, 0, 1), *tag("colors", 1, 1, 0))["published"]
    assert found == pytest.approx({"overall": (0.5 + 2 / 3) / 2, "counting": 0.5, "colors": 2 / 3})


def test_wise_published_and_intended() -> None:
    # WiScores by group: Cultural 0.9 and 0.5 (mean 0.7), Time 0.2, Physics 0.6.
    parts = [("Cultural", 0.9), ("Cultural", 0.5), ("Time", 0.2), ("Physics", 0.6)]
    found = rows("wise", *(({"tag": tag}, {"wiscore": value}) for tag, value in parts))
    assert found["published"]["overall"] == pytest.approx((0.7 + 0.2 + 0.6) / 3)
    assert found["intended"]["overall"] == pytest.approx((0.4 * 0.7 + 0.167 * 0.2 + 0.1 * 0.6) / 0.667)
    scores = suite_of("wise").parse({}, "wise", "**Consistency**: 2\nRealism: 1\nAesthetic Quality: 0")
    assert scores is not None and scores["wiscore"] == pytest.approx((0.7 * 2 + 0.2 * 1) / 2)


def test_compbench_composite_and_both_overalls() -> None:
    parts = [("color", 80), ("color", 60), ("complex", 50), ("complex_action", 40), ("complex_spatial", 30)]
    found = rows("t2i-compbench", *(({"tag": tag}, {"score": value}) for tag, value in parts))
    assert found["published"]["complex composite"] == pytest.approx(40)
    assert found["intended"]["overall"] == pytest.approx((70 + 40) / 2)
    assert found["published"]["overall"] == pytest.approx((70 + 40) / 8)


def test_reasonbench_weighs_details() -> None:
    entity = {"entity_evaluation": 1.0, "other_details_evaluation": 0.5, "quality_evaluation": 0.5}
    idiom = {"reason_evaluation": 0.25, "quality_evaluation": 1.0}
    found = rows("t2i-reasonbench", ({"tag": "entity"}, entity), ({"tag": "idiom"}, idiom))["published"]
    assert found["entity: accuracy"] == pytest.approx(85) and found["idiom: accuracy"] == pytest.approx(25)
    assert found["mean: accuracy"] == pytest.approx(55) and found["mean: quality"] == pytest.approx(75)


def test_gedit_is_a_mean_of_tasks_of_geometric_means() -> None:
    item = lambda tag, common: {"tag": tag, "language": "en", "intersection": common}  # noqa: E731
    parts = [(item("add", True), {"SC": 4, "PQ": 9}), (item("add", False), {"SC": 0, "PQ": 9})]
    parts.append((item("style", True), {"SC": 8, "PQ": 2}))
    found = rows("gedit", *parts)["published"]
    # add: O 6 and 0, mean 3; style: O 4.
    assert found["en O"] == pytest.approx(3.5) and found["en SC"] == pytest.approx((2 + 8) / 2)
    assert found["en intersection O"] == pytest.approx((6 + 4) / 2)


def test_imgedit_overall_is_over_items() -> None:
    parts = [({"tag": "add"}, {"score": 3.0}), ({"tag": "add"}, {"score": 4.0}), ({"tag": "style"}, {"score": 1.67})]
    found = rows("imgedit", *parts)["published"]
    assert found == pytest.approx({"overall": (3 + 4 + 1.67) / 3, "add": 3.5, "style": 1.67})


def test_kris_means_are_flat() -> None:
    parts = [
        ({"tag": "biology"}, {"VC": 100, "IF": 50, "KP": 0, "VQ": 75}),
        ({"tag": "color_change"}, {"VC": 25, "IF": 0, "VQ": 50}),
    ]
    found = rows("kris", *parts)["published"]
    assert found["overall"] == pytest.approx(300 / 7) and found["Conceptual"] == pytest.approx(225 / 4)
    assert found["Factual"] == pytest.approx(25) and found["KP"] == 0


def test_rise_published_drops_consistency_everywhere() -> None:
    five = {"consistency": 5, "reasoning": 5, "plausibility": 5}
    parts = [
        (
            {"tag": "temporal_reasoning", "consistency_free": None},
            {"consistency": 1, "reasoning": 3, "plausibility": 5},
        ),
        ({"tag": "causal_reasoning", "consistency_free": True}, {"reasoning": 1, "plausibility": 2}),
        ({"tag": "logical_reasoning", "consistency_free": None}, {"consistency": 5, "reasoning": 1}),
        ({"tag": "spatial_reasoning", "consistency_free": None}, five),
    ]
    found = rows("rise", *parts)
    # temporal: 0.3 + 1.5 + 1 = 2.8, or 0.8 * 3 + 0.2 * 5 = 3.4; causal 1.2, halved to the floor 1; logical 1.1.
    assert found["intended"]["overall: score"] == pytest.approx(25 * (1.8 + 0 + 0.1 + 4) / 4)
    assert found["published"]["overall: score"] == pytest.approx(25 * (2.4 + 0 + 0.1 + 4) / 4)
    assert found["intended"]["overall: accuracy"] == found["published"]["overall: accuracy"] == 25


def test_intelligentbench() -> None:
    assert rows("intelligentbench", ({}, {"score": 1.0}), ({}, {"score": 0.5}))["published"] == {"overall": 75.0}


def test_mme_acc_and_acc_plus() -> None:
    item = lambda task, image: {"tag": task, "image": image}  # noqa: E731
    parts = [(item("count", "a"), {"correct": True}), (item("count", "a"), {"correct": True})]
    parts += [(item("count", "b"), {"correct": True}), (item("count", "b"), {"correct": False})]
    parts += [(item("code_reasoning", "c"), {"correct": False}), (item("code_reasoning", "c"), {"correct": True})]
    found = rows("mme", *parts)["published"]
    assert (found["perception"], found["cognition"], found["sum"]) == pytest.approx((75 + 50, 50, 175))


def test_mmvp_counts_pairs() -> None:
    parts = [
        ({"pair": 0}, {"correct": True}),
        ({"pair": 0}, {"correct": True}),
        ({"pair": 1}, {"correct": True}),
        ({"pair": 1}, {"correct": False}),
    ]
    assert rows("mmvp", *parts)["published"] == {"pairs": 50.0, "single answers": 75.0}


@pytest.mark.parametrize("name", ["mmbench", "mmmu", "mathvista"])
def test_accuracies(name: str) -> None:
    parts = [({"tag": "x"}, {"correct": True}), ({"tag": "y"}, {"correct": False}), ({"tag": "y"}, {"correct": True})]
    assert rows(name, *parts)["published"] == pytest.approx({"accuracy": 200 / 3, "x": 100.0, "y": 50.0})


def test_mm_vet_takes_graded_scores() -> None:
    assert rows("mm-vet", ({}, {"correct": 0.3}), ({}, {"correct": 1.0}))["published"] == {"accuracy": 65.0}


# GenEval's rule


def box(name: str, left: float, top: float, score: float = 0.95, color: str | None = None) -> dict[str, Any]:
    return {"class": name, "box": [left, top, left + 100, top + 100], "score": score, "color": color}


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (41, 0, {"right of"}),
        (39, 0, set()),
        (20, 0, set()),
        (100, 100, {"right of", "below"}),
        (200, 140, {"right of"}),
        (-60, 0, {"left of"}),
        (0, -200, {"above"}),
    ],
)
def test_relations_of_equal_boxes(dx: float, dy: float, expected: set[str]) -> None:
    assert geneval.relations([dx, dy, dx + 100, dy + 100], [0, 0, 100, 100]) == expected


CASES = [
    (
        {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]},
        [box("cat", 0, 0, 0.31), box("dog", 9, 9)],
        True,
    ),
    ({"tag": "two_object", "include": [{"class": "cat", "count": 1}]}, [box("cat", 0, 0, 0.3)], False),
    (
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
        [box("cat", 0, 0), box("cat", 9, 9)],
        True,
    ),
    (
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
        [box("cat", n, 0) for n in range(3)],
        False,
    ),
    ({"tag": "counting", "include": [{"class": "cat", "count": 2}]}, [box("cat", 0, 0), box("cat", 9, 9, 0.89)], False),
    (
        {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]},
        [box("cat", 0, 0, 0.9, "red"), box("cat", 9, 9, 0.8, "blue")],
        True,
    ),
    (
        {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]},
        [box("cat", 0, 0, 0.8, "red"), box("cat", 9, 9, 0.9, "blue")],
        False,
    ),
    (
        {
            "tag": "position",
            "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        },
        [box("cat", 0, 0), box("dog", 200, 0)],
        True,
    ),
    (
        {
            "tag": "position",
            "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}],
        },
        [box("cat", 0, 0), box("dog", 200, 0)],
        False,
    ),
    (
        {
            "tag": "position",
            "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        },
        [box("cat", 0, 0)],
        False,
    ),
]


@pytest.mark.parametrize(("item", "objects", "expected"), CASES)
def test_geneval_rule(item: Item, objects: list[dict[str, Any]], expected: bool) -> None:
    text = f"Here they are:\n```json\n{json.dumps({'objects': objects})}\n```"
    assert suite_of("geneval").parse(item, "detections", text) == {"correct": expected}


# Answers that are no scores


@pytest.mark.parametrize(
    ("name", "item", "criterion", "text"),
    [
        ("wise", {}, "wise", "Consistency: 3\nRealism: 1\nAesthetic Quality: 0"),
        ("wise", {}, "wise", "Consistency: 2\nConsistency: 1\nRealism: 1\nAesthetic Quality: 0"),
        ("wise", {}, "wise", "I cannot judge this."),
        ("t2i-compbench", {}, "alignment", '{"score": 850}'),
        ("t2i-compbench", {}, "alignment", '{"score": null}'),
        ("t2i-compbench", {}, "alignment", '{"score": true}'),
        ("t2i-reasonbench", {"questions": {"b": {"q1": "", "c1": "", "q2": "", "c2": ""}}}, "b", '{"score": [1]}'),
        ("t2i-reasonbench", {"questions": {"b": {"q1": "", "c1": ""}}}, "b", '{"score": [0.7]}'),
        ("gedit", {}, "SC", '{"score": [8, 11]}'),
        ("gedit", {}, "SC", "[8, 9]"),
        ("imgedit", {}, "edit", "Instruction: 4\nRest: 6\nQuality: 2"),
        ("imgedit", {}, "edit", "Instruction: 4\nQuality: 2"),
        ("kris", {}, "instruction and knowledge", '{"instruction_score": 4}'),
        ("rise", {}, "reasoning", "Final Score: 6"),
        ("rise", {}, "logical", "Final Score: 1"),
        ("intelligentbench", {}, "answer", '{"score": 1.5}'),
        ("mm-vet", {}, "correctness", "fully right"),
        ("geneval", {"tag": "x", "include": []}, "detections", '{"objects": [{"class": "cat"}]}'),
    ],
)
def test_unparsable_answers_have_no_scores(name: str, item: Item, criterion: str, text: str) -> None:
    assert suite_of(name).parse(item, criterion, text) is None


@pytest.mark.parametrize(
    ("name", "item", "criterion", "text", "scores"),
    [
        ("t2i-compbench", {}, "alignment", 'Sure: {"score": "85", "explanation": "{"}', {"score": 85.0}),
        (
            "t2i-reasonbench",
            {"questions": {"b": {"q1": "", "c1": "", "x_q2": "", "x_c2": "", "scoring": ""}}},
            "b",
            '{"score": [1, 0.5]}',
            {"b": 0.75},
        ),
        ("gedit", {}, "PQ", '```json\n{"score": [8, 9], "reasoning": "a {brace}"}\n```', {"PQ": 8.0}),
        ("imgedit", {}, "edit", "Instruction: 4\nRest: **5**\nQuality: 2", {"score": 3.67}),
        ("kris", {}, "consistency", '{"score": 4}', {"VC": 75.0}),
        ("rise", {}, "logical", "Because.\nFinal Score: 1, 0", {"consistency": 5.0, "reasoning": 1.0}),
        ("rise", {}, "reasoning", "**Final Score**: 4", {"reasoning": 4.0}),
        ("mm-vet", {}, "correctness", "0.7\nbecause", {"correct": 0.7}),
        (
            "mathvista",
            {"answer_type": "float", "answer": "1.50", "precision": 1},
            "extraction",
            "1.46",
            {"correct": True},
        ),
        ("mathvista", {"answer_type": "integer", "answer": "3"}, "extraction", "4", {"correct": False}),
        (
            "mathvista",
            {"answer_type": "text", "answer": "blue", "choices": ["red", "blue"]},
            "extraction",
            "blu",
            {"correct": True},
        ),
    ],
)
def test_answers_with_scores(name: str, item: Item, criterion: str, text: str, scores: Any) -> None:
    assert suite_of(name).parse(item, criterion, text) == scores


def test_choices() -> None:
    options = ["a red car", "a bus", "a bus stop"]
    replies = ("A", "(B)", "C. a bus stop", "It is a red car.", "D", "a bus stop", "")
    assert [chosen(text, options) for text in replies] == [
        "A",
        "B",
        "C",
        "A",
        None,
        None,
        None,
    ]
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(("text", "correct"), [("Yes.", True), ("no", False), ("Maybe yes", False), ("  YES", True)])
def test_mme_looks_at_four_characters(text: str, correct: bool) -> None:
    exact = suite_of("mme").exact
    assert exact is not None and exact({"answer": "yes"}, text)["correct"] == correct


# Files


MMBENCH_HEAD = "index\tquestion\thint\tA\tB\tanswer\tcategory\timage\n"
MMVP_HEAD = "Index,Question,Options,Correct Answer\n"


def small_data(folder: Path) -> dict[str, Path]:
    """A golden folder of two or three items for each suite, in the official layout."""
    (folder / "pixel.png").parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "pixel.png")
    pixel = base64.b64encode((folder / "pixel.png").read_bytes()).decode()
    question = {
        "prompt": "p",
        "id": 1,
        "quality_evaluation": {"q1": "", "c1": ""},
        "reason_evaluation": {"q1": "", "c1": ""},
    }
    files(
        folder,
        {
            "geneval.jsonl": jsonl(
                {"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": "a red cat"},
                {"tag": "counting", "include": [], "prompt": "two cats"},
            ),
            "wise.json": [
                {"Prompt": "p", "Explanation": "e", "Category": "c", "Subcategory": "Longitudinal time", "prompt_id": n}
                for n in (1, 450, 701, 1000)
            ],
            "comp/color_val.txt": "a red car and a blue bus.\r\na green/grey tree\r\n",
            "comp/complex_val.txt": "the red car is left of the bus\n",
            "reason/evaluation_idiom.json": [question, {**question, "id": "12"}],
            "gedit.jsonl": jsonl(
                *(
                    {
                        "task_type": "add",
                        "key": f"k{n}",
                        "instruction": "i",
                        "instruction_language": "en",
                        "input_image": "a.png",
                    }
                    for n in (1, 2)
                )
            ),
            "a.png": None,
            "imgedit.json": {
                "10": {"id": "a.png", "prompt": "p", "edit_type": "add"},
                "11": {"id": "a.png", "prompt": "p", "edit_type": "style"},
            },
            "kris.json": [
                {"id": 1, "type": "biology", "ori_img": ["1.png", "2.png"], "ins_en": "i", "explain_en": "e"}
            ],
            "biology/1.png": None,
            "biology/2.png": None,
            "rise.json": [
                {"index": "temporal_1", "category": "temporal_reasoning", "image": "a.png", "instruction": "i"}
            ],
            "intelligent.json": [{"id": 1, "image": "a.png", "text": "t", "answer_image": "a.png"}],
            "mme/count.txt": "1.jpg\tIs it one? Answer yes or no.\tYes\n1.jpg\tIs it two? Answer yes or no.\tNo\n",
            "mme/count/1.jpg": None,
            "mmbench.tsv": MMBENCH_HEAD + f"241\tWhat?\tnan\tcat\tdog\tB\tx\t{pixel}\n",
            "mmmu.jsonl": jsonl(
                {
                    "id": "validation_Art_1",
                    "question": "<image 1> Who?",
                    "options": ["x", "y"],
                    "answer": "B",
                    "images": ["a.png"],
                },
                {"id": "validation_Math_2", "question": "How many?", "options": [], "answer": "3.50", "images": []},
            ),
            "mmvet.json": {
                "v1_0": {"imagename": "a.png", "question": "q", "answer": "a", "capability": ["ocr", "math"]}
            },
            "mathvista.jsonl": jsonl(
                {
                    "pid": "1",
                    "query": "q",
                    "image": "a.png",
                    "answer": "3",
                    "answer_type": "integer",
                    "question_type": "free_form",
                    "choices": None,
                    "precision": None,
                }
            ),
            "mmvp/Questions.csv": MMVP_HEAD + "1,Open?,(a) Open (b) Closed,(a)\n2,Open?,(a) Open (b) Closed,(b)\n",
            "mmvp/MMVP Images/1.jpg": None,
            "mmvp/MMVP Images/2.jpg": None,
        },
    )
    names = {
        "geneval": "geneval.jsonl",
        "wise": "wise.json",
        "t2i-compbench": "comp",
        "t2i-reasonbench": "reason",
        "gedit": "gedit.jsonl",
        "imgedit": "imgedit.json",
        "kris": "kris.json",
        "rise": "rise.json",
        "intelligentbench": "intelligent.json",
        "mme": "mme",
        "mmbench": "mmbench.tsv",
        "mmmu": "mmmu.jsonl",
        "mm-vet": "mmvet.json",
        "mathvista": "mathvista.jsonl",
        "mmvp": "mmvp/Questions.csv",
    }
    return {name: folder / place for name, place in names.items()}


OUTPUTS = {
    "geneval": ["00000/samples/00001.png", "00001/samples/00001.png"],
    "wise": ["1.png", "450.png", "701.png", "1000.png"],
    "t2i-compbench": [
        "color/samples/a red car and a blue bus_000001.png",
        "color/samples/a green grey tree_000011.png",
        "complex/samples/the red car is left of the bus_000001.png",
    ],
    "t2i-reasonbench": ["idiom/0001.png", "idiom/0012.png"],
    "gedit": ["fullset/add/en/k1.png", "fullset/add/en/k2.png"],
    "imgedit": ["10.png", "11.png"],
    "kris": ["biology/1.png"],
    "rise": ["temporal_reasoning/temporal_1.png"],
    "intelligentbench": ["1.png"],
}
"""Where the second sample of each item goes."""


def test_official_files_are_read_and_named(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    assert data.keys() == SUITES.keys() - {"shapes"}
    for name, path in data.items():
        suite = suite_of(name)
        items = suite.read(path)
        assert items and all({"id", "ability", "tag", "prompt"} <= item.keys() for item in items), name
        json.dumps(items)
        if name in OUTPUTS:
            assert [suite.output(item, 1) for item in items] == OUTPUTS[name]
        for item in items:
            assert len(suite.inputs(item, 0)) == len(item.get("images", ())) + len(item.get("embedded", ()))
    wise = suite_of("wise").read(data["wise"])
    assert [item["tag"] for item in wise] == ["Cultural", "Time", "Biology", "Chemistry"]
    (first, second) = suite_of("mmmu").read(data["mmmu"])
    assert (
        first["prompt"]
        == "<image 1> Who?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
    )
    exact = suite_of("mmmu").exact
    assert exact is not None and exact(second, "It is 3.5.")["correct"] and not exact(second, "35")["correct"]
    assert suite_of("mme").read(data["mme"])[0]["prompt"].endswith("Answer the question using a single word or phrase.")


def test_companions_and_answer_files(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    item = suite_of("geneval").read(data["geneval"])[0]
    beside = suite_of("geneval").companions(item, {})
    assert json.loads(beside["00000/metadata.jsonl"])["prompt"] == "a red cat"
    edit = suite_of("gedit").read(data["gedit"])[0]
    assert list(suite_of("gedit").companions(edit, {"file": "fullset/add/en/k1.png"})) == [
        "fullset/add/en/k1_SRCIMG.png"
    ]
    assert suite_of("wise").companions({"id": "7"}, {"thought": "so"}) == {"7.txt": b"so"}
    answers = {"mme": "Yes", "mmbench": "B", "mmmu": "B", "mm-vet": "a", "mathvista": "3", "mmvp": "A"}
    for name, text in answers.items():
        suite = suite_of(name)
        suite.export([Row(each, 0, {}, text) for each in suite.read(data[name])], tmp_path / name)
    assert (tmp_path / "mme/answers/count.txt").read_text().splitlines()[1] == (
        "1.jpg\tIs it two? Answer yes or no.\tNo\tYes"
    )
    assert (tmp_path / "mmbench/answers/mmbench.csv").read_text().splitlines()[1] == "241,B,B"
    assert json.loads((tmp_path / "mmmu/answers/prediction.json").read_text())["validation_Art_1"] == "B"
    assert json.loads((tmp_path / "mm-vet/answers/results.json").read_text()) == {"v1_0": "a"}
    assert len((tmp_path / "mmvp/answers/results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("wise", '[{"Prompt": 3}]', r"wise\.json, item 0: Prompt = 3; expected str"),
        ("wise", "[]", "no items"),
        ("wise", "nonsense", "cannot be read"),
        ("imgedit", '{"1": {"id": "gone.png", "prompt": "p", "edit_type": "add"}}', r"gone\.png is not there"),
        ("kris", '[{"id": 1, "type": "t", "ori_img": "x.png"}]', "ins_en = None"),
    ],
)
def test_files_that_are_no_suite(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(UserError, match=words):
        suite_of(name).read(tmp_path / f"{name}.json")
    with pytest.raises(UserError, match="--data"):
        suite_of(name).read(None)


def test_every_suite_is_whole() -> None:
    from megabagel.commands.evaluate_suite import NAMES
    from megabagel.inference.presets import PRESETS

    assert tuple(SUITES) == NAMES
    for suite in SUITES.values():
        assert suite.preset is None or suite.preset in PRESETS
        assert suite.exact or suite.templates
    assert not math.isnan(sum(len(suite.data) for suite in SUITES.values()))

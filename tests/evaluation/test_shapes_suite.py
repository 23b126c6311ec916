"""The suite is a pure function of its seed, held out, and the checker agrees with every truth in it."""

import json
from collections import Counter

import pytest

from megabagel.data.builders.scenes_page import Scene
from megabagel.data.builders.scenes_text import TAGS, Prompt, held_out
from megabagel.evaluation.shapes_suite import EDITS, QUESTIONS, check, page_of, self_test, shapes_suite, yes_no_scores

SUITE = shapes_suite(seed=5, count=42)


def test_it_is_a_pure_function_of_the_seed() -> None:
    assert shapes_suite(5, 42) == json.loads(json.dumps(SUITE)) != shapes_suite(6, 42)
    longer = {item["id"]: item for item in shapes_suite(5, 84)}
    assert all(longer[item["id"]] == item for item in SUITE if item["ability"] != "ask")


def test_every_tag_has_its_share() -> None:
    tags = Counter((item["ability"], item["tag"]) for item in SUITE)
    assert {tag: tags["draw", tag] for tag in TAGS} == dict.fromkeys(TAGS, 7)
    assert {kind: tags["edit", kind] for kind in EDITS} == dict.fromkeys(EDITS, 6)
    assert {kind: tags["ask", kind] for kind in QUESTIONS} == dict.fromkeys(QUESTIONS, 7)
    assert tags["ask", "yes/no"] == 14 and len({item["id"] for item in SUITE}) == len(SUITE) == 126


def test_every_item_is_held_out() -> None:
    for item in SUITE:
        if item["ability"] == "draw":
            assert Prompt.from_json(item).held_out and Prompt.from_json(item).text == item["prompt"]
        else:
            assert held_out(Scene.from_json(item.get("before") or item["scene"]))


def test_yes_no_questions_come_in_pairs_about_one_page() -> None:
    pairs: dict[int, list[dict[str, object]]] = {}
    for item in SUITE:
        if item["tag"] == "yes/no":
            pairs.setdefault(item["pair"], []).append(item)
    for first, second in pairs.values():
        assert first["scene"] == second["scene"] and {first["answer"], second["answer"]} == {"yes", "no"}


@pytest.mark.parametrize(("size", "count"), [(64, 42), (80, 12)])
def test_the_checker_finds_truths_right_and_wrong_outputs_wrong(size: int, count: int) -> None:
    assert self_test(seed=size, count=count, size=size) == {"truths": 1.0, "wrong": 0.0}


def test_the_page_unchanged_is_no_edit() -> None:
    for item in SUITE:
        if item["ability"] == "edit":
            page = page_of(item, 64)
            assert page is not None
            verdict = check(item, page)
            assert not verdict["made"] and verdict["kept"] and not verdict["correct"] and verdict["faults"]


def test_acc_and_acc_plus() -> None:
    assert yes_no_scores([(0, True), (0, True), (1, True), (1, False)]) == (0.75, 0.5)

"""The four recipes of reasoning traces with a stand-in model: layout, caps, and what is refused."""

import json
from pathlib import Path

import pytest

from megabagel.curation.draft import Draft, Picture, Text
from megabagel.curation.models.seam import prompt
from megabagel.curation.reasoning import useless
from megabagel.curation.samples import interleaved
from megabagel.inference.prompts import THINK_BEFORE_IMAGE
from tests.curation.test_models import direct, run
from tests.support.pictures import file_of, noise

__all__ = ["direct"]

THOUGHT = "The sky has to become dark, with a moon, while the house and the trees stay as they are."
A, B, C = (Picture(f"{n}.png", file_of(noise(8, 8, seed=n))) for n in range(3))


def layout(draft: Draft) -> list[tuple[str, str]]:
    _, files = interleaved(draft)
    items = json.loads(files["json"])["items"]
    return [(item["role"], item.get("text", item.get("name"))) for item in items]


def test_a_captioned_picture_gets_a_vague_request_and_a_plan(tmp_path: Path) -> None:
    def answer(text: str) -> str:
        return "Something for a calm evening." if prompt("vague_query") in text else f"<think>{THOUGHT}</think> " * 9

    (draft,), _ = run("think_t2i", answer, tmp_path, Draft("k", (Text("A house at night."), A)))
    assert layout(draft) == [
        ("condition", THINK_BEFORE_IMAGE),
        ("condition", "Something for a calm evening."),
        ("target", f"<think>{THOUGHT} {THOUGHT}</think>"),  # three would be more than 60 tokens
        ("target", "0.png"),
    ]


@pytest.mark.parametrize("name", ["think_edit", "think_video"])
def test_an_edit_gets_a_plan(tmp_path: Path, name: str) -> None:
    seen = []

    def answer(text: str) -> str:
        seen.append(text)
        return THOUGHT

    edit = Draft("k", (Text("Before."), A, Text("make it night"), B, Text("more"), C))
    poor = [Draft("one", (Text("x"), A)), Draft("two", (Text("x"), A, B))]
    (draft,), tally = run(name, answer, tmp_path, edit, *poor)
    assert layout(draft)[1:] == [
        ("condition", "0.png"),
        ("condition", "make it night"),
        ("target", f"<think>{THOUGHT}</think>"),
        ("target", "1.png"),
    ]
    assert prompt(name) in seen[0] and "make it night" in seen[0] and seen[0].count("data:image/png") == 2
    assert tally.documents == {"too few pictures or no text": 1, "no instruction between two pictures": 1}
    assert tally.pictures == {
        "too few pictures or no text": 1,
        "no instruction between two pictures": 2,
        "not part of the sample": 1,
    }


def test_pictures_of_a_document_become_a_conceptual_edit(tmp_path: Path) -> None:
    def answer(text: str) -> str:
        key = next(word for word in text.split() if word.startswith("zz"))
        if prompt("concept_pair") in text:
            return {"zz1": "{}", "zz2": '{"input": 0, "output": 7}'}.get(key, '```{"input": 2, "output": 0}```')
        if prompt("concept_question") in text:
            return (
                "no"
                if key == "zz3"
                else json.dumps({"question": f"What then, {key} ?", "answer": f"The leaf falls {key}."})
            )
        if prompt("concept_judge") in text:
            return {"zz4": "2", "zz5": "?"}.get(key, "Score: 5")
        return f"{THOUGHT} the leaf falls {key}" if key == "zz6" else THOUGHT * 12

    drafts = [Draft(str(n), (Text(f" zz{n} text "), A, Text("then"), B, C)) for n in range(7)]
    kept, tally = run("think_concept", answer, tmp_path, *drafts)
    assert [draft.key for draft in kept] == ["0"]
    given = layout(kept[0])
    assert given[1:3] == [("condition", "0.png"), ("condition", "What then, zz0 ?")]
    assert kept[0].pictures[0].data == C.data and kept[0].pictures[1].data == A.data
    assert given[-1] == ("target", "The leaf falls zz0.") and kept[0].meta["tokens"] <= 200
    assert tally.documents == {
        "no pair of pictures": 2,
        "no request": 1,
        "judged below 4": 1,
        "no judgement": 1,
        "thought repeats the answer": 1,
    }


@pytest.mark.parametrize(
    ("thought", "reason"),
    [
        (THOUGHT, None),
        ("Make it dark.", "thought too short"),
        (f"As seen in the target image, {THOUGHT}", "thought knows the result"),
        ("I cannot look at images, so that I do not know what to do.", "thought knows the result"),
    ],
)
def test_thoughts_of_no_use(thought: str, reason: str | None) -> None:
    assert useless(thought) == reason

"""Prompts and the generate stage: the same pictures in any order and after any kill."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megabagel.errors import UserError
from megabagel.posttrain.generate import DrawOptions, generate
from megabagel.posttrain.journal import Journal
from megabagel.posttrain.prompts import read_prompts

OPTIONS = DrawOptions(candidates=2, size=(32, 16), steps=3, seed=4)
PROMPTS = [{"id": name, "prompt": f"a {name}", "tag": "t"} for name in ("cat", "dog", "cow")]


def contents(work: Path) -> dict[str, bytes]:
    return {str(path.relative_to(work)): path.read_bytes() for path in sorted(work.rglob("*")) if path.is_file()}


class Killed(BaseException):
    """The process is gone."""


def test_a_kill_at_any_item_changes_nothing(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = generate(model, PROMPTS, tmp_path / "whole", OPTIONS)
    assert counts == {"prompts": 3, "pictures": 6, "known": 0, "drawn": 6, "failed": 0}
    whole = contents(tmp_path / "whole")
    assert len(whole) == 8 and len(set(whole.values())) == 8, "every candidate is another picture"
    append = Journal.append
    for kept in (0, 1, 4):
        work = tmp_path / f"cut_{kept}"
        with monkeypatch.context() as patch:

            def dies(journal: Journal, record: dict[str, Any], kept: int = kept) -> None:
                if len(journal.records) == kept:
                    with journal.path.open("ab") as file:
                        file.write(json.dumps(record).encode()[:30])
                    raise Killed
                append(journal, record)

            patch.setattr(Journal, "append", dies)
            with pytest.raises(Killed):
                generate(model, PROMPTS, work, OPTIONS)
        counts = generate(model, PROMPTS, work, OPTIONS)
        assert (counts["known"], counts["drawn"]) == (kept, 6 - kept)
        assert contents(work) == whole
    assert generate(model, PROMPTS, tmp_path / "whole", OPTIONS)["drawn"] == 0


def test_records_and_order_of_prompts(model: Any, tmp_path: Path) -> None:
    generate(model, PROMPTS[::-1][:2], tmp_path, OPTIONS)
    generate(model, PROMPTS, tmp_path, OPTIONS)
    records = [json.loads(line) for line in (tmp_path / "drawn.jsonl").read_text().splitlines()]
    assert [record["image_file"] for record in records] == [
        f"{n}_{c}.png" for n in ("cow", "dog", "cat") for c in (0, 1)
    ]
    assert records[0]["item"] == {"tag": "t"} and records[0]["size"] == [32, 16] and records[0]["thought"] is None


def test_a_missing_picture_and_other_weights_are_refused(model: Any, tmp_path: Path) -> None:
    generate(model, PROMPTS[:1], tmp_path, OPTIONS)
    (tmp_path / "images" / "cat_1.png").unlink()
    with pytest.raises(UserError, match=r"cat_1.png: is named in drawn.jsonl and missing"):
        generate(model, PROMPTS[:1], tmp_path, OPTIONS)
    with pytest.raises(UserError, match="was begun with seed = 4, now 5"):
        generate(model, PROMPTS, tmp_path, DrawOptions(candidates=2, size=(32, 16), steps=3, seed=5))


def test_a_full_disk_stops_with_one_message(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def full(descriptor: int) -> None:
        if ".png" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*start the same command again"):
        generate(model, PROMPTS, tmp_path, OPTIONS)


def test_what_cannot_be_drawn_is_named_and_not_tried_again(model: Any, tmp_path: Path) -> None:
    prompts = [{"id": "long", "prompt": "x" * 5000}, PROMPTS[0]]
    assert generate(model, prompts, tmp_path, OPTIONS)["failed"] == 2
    record = json.loads((tmp_path / "drawn.jsonl").read_text().splitlines()[0])
    assert "KV cache" in record["error"] and not (tmp_path / "images" / "long_0.png").exists()
    with pytest.raises(UserError, match="expected multiples of 16"):
        generate(model, prompts, tmp_path / "other", DrawOptions(size=(17, 16)))
    assert generate(model, prompts, tmp_path, OPTIONS) | {"failed": 0} == {
        "prompts": 2, "pictures": 4, "known": 4, "drawn": 0, "failed": 0
    }  # fmt: skip


def test_prompt_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \na cat\n")
    assert read_prompts(str(tmp_path / "a.txt")) == [
        {"id": "000001", "prompt": "a cat"}, {"id": "000003", "prompt": "a dog"}
    ]  # fmt: skip
    assert "left out because they are there already: 1" in caplog.text and "line 4 repeats 000001" in caplog.text
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "id": "x", "tag": 1}\n{"prompt": "b"}\n')
    assert read_prompts(str(tmp_path / "b.jsonl")) == [
        {"id": "x", "prompt": "a", "tag": 1}, {"id": "000002", "prompt": "b"}
    ]  # fmt: skip
    (tmp_path / "c.json").write_text('[{"Question": "a", "Category": "c", "Question_id": 17}]')
    assert read_prompts(str(tmp_path / "c.json")) == [{"id": "17", "prompt": "a"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected a prompt, found None"),
        ("a.jsonl", '{"prompt": "a"}\nnonsense\n', "line 2: no JSON"),
        ("a.jsonl", '{"prompt": "a", "id": "../x"}\n', "is no file name"),
        ("a.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', "belongs to another prompt"),
        ("a.jsonl", "[]\n", "line 1: expected"),
        ("a.txt", "\n", "holds no prompt"),
        ("a.json", "{}", "expected a list"),
        ("a.json", "[1]", "entry 0"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / name))


def test_prompts_of_the_drawn_world_are_not_held_out() -> None:
    from megabagel.data.builders.scenes_text import Prompt

    found = read_prompts("scenes:60", seed=3)
    assert len({entry["prompt"] for entry in found}) == 60 and len({entry["tag"] for entry in found}) == 6
    assert not any(Prompt.from_json(entry).held_out for entry in found)
    assert found == read_prompts("scenes:60", seed=3) != read_prompts("scenes:60", seed=4)
    for wrong in ("scenes:0", "scenes:x"):
        with pytest.raises(UserError, match="expected scenes:COUNT"):
            read_prompts(wrong)

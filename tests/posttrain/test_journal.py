"""A JSONL file that survives kills, a full disk and other settings."""

import os
from pathlib import Path

import pytest

from megabagel.errors import UserError
from megabagel.posttrain.journal import Journal, read_records


def opened(path: Path, **settings: object) -> Journal:
    return Journal(path, "name", settings or {"steps": 3})


def test_records_come_back_in_order(tmp_path: Path) -> None:
    journal = opened(tmp_path / "a.jsonl")
    for name in ("b", "ä", "a"):
        journal.append({"name": name, "value": [1, None]})
    again = opened(tmp_path / "a.jsonl")
    assert list(again.records) == ["b", "ä", "a"] and "ä" in again and "c" not in again


@pytest.mark.parametrize("cut", range(1, 20, 3))
def test_a_cut_last_line_is_done_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    for name in ("a", "b"):
        opened(path).append({"name": name, "x": "y"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal = opened(path)
    assert list(journal.records) == ["a"]
    journal.append({"name": "b", "x": "y"})
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_the_record_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    journal = opened(path)
    journal.append({"name": "a"})
    whole = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"a.jsonl: cannot be written \(No space left on device\)"):
            journal.append({"name": "b", "x": "y" * 100})
    assert path.read_bytes() == whole and "b" not in journal
    journal.append({"name": "b"})
    assert [record["name"] for record in read_records(path, "name")] == ["a", "b"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    opened(tmp_path / "a.jsonl", steps=3, seed=0)
    opened(tmp_path / "a.jsonl", steps=3, seed=0)
    with pytest.raises(UserError, match=r"was begun with steps = 3, now 4\. Use the same settings"):
        opened(tmp_path / "a.jsonl", steps=4, seed=0)


def test_a_damaged_line_is_named_and_a_repeated_item_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"name": "a", "x": 1}\n{"name": "a", "x": 2}\n')
    assert [record["x"] for record in read_records(path, "name")] == [1]
    for line, said in [(x, "no JSON object") for x in ("{", "[]", "3", "")] + [
        ('{"other": 1}', "no record with a field 'name'")
    ]:
        path.write_text(f'{{"name": "a"}}\n{line}\n')
        with pytest.raises(UserError, match=f"line 2: {said}"):
            opened(path)

from pathlib import Path

import pytest

from megabagel.data.files import staging, write_atomic


def test_files_appear_when_the_block_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    with staging(folder) as stage:
        (stage / "a").write_text("new")
        (stage / "b").write_text("new")
        assert not (folder / "a").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), staging(tmp_path) as stage:
        (stage / "a").write_text("new")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_write_atomic_replaces(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one")
    write_atomic(tmp_path / "a", b"two")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"two")]

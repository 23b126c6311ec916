"""`megabagel data index`: counts per source, and the samples that are not used by name."""

import os
from pathlib import Path

import pytest

from megabagel.cli import main
from megabagel.data.formats.shards import write_shards
from tests.data.test_index import captioned, shard
from tests.support.pictures import file_of, noise


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_counts_of_one_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions of 7, 8 and 9 ids; images of 8 x 9, 9 x 10 and 10 x 11 pixels."""
    bad = [
        ("zero", {"png": b"", "txt": b"x"}),
        ("mute", {"png": file_of(noise(900, 900))}),
        ("empty", {"png": b"", "txt": b"x"}),
    ]
    shards = shard(tmp_path, [*captioned(3), *bad])
    assert main(["data", "index", f"{tmp_path}/*.tar"]) == 0
    first, samples, texts, images, files, *skipped = lines(capsys)
    assert first == f"source (t2i): {tmp_path}/*.tar"
    assert samples == "  samples: 3, skipped: 3"
    assert texts == "  texts: 3, ids: 24, longest: 9"
    assert images == "  images: 3, 8 x 9 to 10 x 11 pixels, 0.00 million on average"
    assert files.startswith(f"  shards: 1, {shards[0].stat().st_size / 1e6:.1f} MB; fingerprint 3:t2i:")
    assert skipped == [
        "  skipped, 2 x zero bytes",
        "  skipped, 1 x no caption",
        "    a-000000.tar: zero: zero bytes (png)",
        "    a-000000.tar: mute: no caption (png)",
        "    a-000000.tar: empty: zero bytes (png)",
    ]


def test_twenty_samples_are_named_or_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(tmp_path, [*captioned(1), *((f"z{n}", {"txt": b"x"}) for n in range(25))])
    assert main(["data", "index", str(tmp_path)]) == 0
    printed = lines(capsys)
    assert [line.split(": ")[1] for line in printed[6:-1]] == [f"z{n}" for n in range(20)]
    assert printed[-1] == "    and 5 more; --all names them"
    assert main(["data", "index", str(tmp_path), "--all"]) == 0
    assert len(lines(capsys)) == 6 + 25


def test_all_sources_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, "notes", [(f"n{n}", {"txt": b"word " * 300}) for n in range(4)], 2)
    shard(tmp_path, captioned(2), "pairs")
    (tmp_path / "run.yaml").write_text(
        f"data:\n  root: {tmp_path}\n  index_dir: {tmp_path}/indexes\n  sources:\n"
        "  - {name: pairs, path: 'pairs-*.tar', task: i2t}\n  - {name: notes, path: 'notes-*.tar', task: text}\n"
    )
    assert main(["data", "index", str(tmp_path / "run.yaml"), "model.vocab=300"]) == 0
    printed = [line for line in lines(capsys) if "shards" not in line]
    assert printed == [
        "pairs (i2t): pairs-*.tar",
        "  samples: 2, skipped: 0",
        "  texts: 2, ids: 15, longest: 8",
        "  images: 2, 8 x 9 to 9 x 10 pixels, 0.00 million on average",
        "notes (text): notes-*.tar",
        "  samples: 4, skipped: 0",
        "  texts: 4, ids: 5996, longest: 1499",
    ]
    assert len(list((tmp_path / "indexes").iterdir())) == 3
    assert not (tmp_path / ".index").exists()


def test_contents_are_compared_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = shard(tmp_path, captioned(2))
    assert main(["data", "index", str(path)]) == 0
    before, state = lines(capsys), path.stat()
    path.write_bytes(path.read_bytes().replace(b"caption!", b"Caption?"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert main(["data", "index", str(path)]) == 0
    assert lines(capsys) == before
    assert main(["data", "index", str(path), "--check"]) == 0
    assert lines(capsys) != before


def test_users_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", str(tmp_path / "x-*.tar")]) == 2
    assert "no file matches" in capsys.readouterr().err
    assert main(["data", "index", str(tmp_path), "data.root=x"]) == 2
    assert "'data.root=x': settings belong to a CONFIG" in capsys.readouterr().err

"""Scans on disk: current and sound, or made anew and said so."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megabagel.data.formats.shards import write_shards
from megabagel.data.index import index as module
from megabagel.data.index.index import Index, build_index
from megabagel.data.tokenize.tokenizer import ByteTokenizer
from tests.data.test_index import BYTES, captioned, shard, sizes
from tests.support.pictures import file_of, noise


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are scanned during a test."""
    names: list[str] = []
    scan = module._scan
    monkeypatch.setattr(
        module,
        "_scan",
        lambda reader, number, *rest: names.append(reader.shards[number].name) or scan(reader, number, *rest),
    )
    return names


def same(one: Index, other: Index) -> bool:
    return (one.documents, one.skipped, one.fingerprint) == (other.documents, other.skipped, other.fingerprint)


def test_the_cache_gives_the_same_index(tmp_path: Path, scanned: list[str]) -> None:
    shards = [
        *shard(tmp_path, [*captioned(3), ("bad", {"png": b"", "txt": b"x"})]),
        *shard(tmp_path, captioned(2), "b"),
    ]
    first = build_index(shards, BYTES, "t2i")
    names = ["a-000000.tar", "b-000000.tar"]
    assert sorted(path.name.rpartition("-")[0] for path in (tmp_path / ".index").iterdir()) == names
    assert same(build_index(shards, BYTES, "t2i"), first)
    assert sorted(scanned) == names


def test_a_folder_of_caches_may_be_shared(tmp_path: Path, scanned: list[str]) -> None:
    """Shards of the same name in two places."""
    cache = tmp_path / "cache"
    for _ in range(2):
        for name, count in (("x", 2), ("y", 3)):
            (tmp_path / name).mkdir(exist_ok=True)
            if not list((tmp_path / name).iterdir()):
                shard(tmp_path / name, captioned(count))
            index = build_index(list((tmp_path / name).glob("*.tar")), BYTES, "t2i", cache=cache)
            assert len(index.documents) == count
    assert len(list(cache.iterdir())) == len(scanned) == 2


def test_only_new_and_changed_shards_are_scanned(tmp_path: Path, scanned: list[str]) -> None:
    shards = [*shard(tmp_path, captioned(3)), *shard(tmp_path, captioned(2, 3), "b")]
    build_index(shards, BYTES, "t2i")
    scanned.clear()
    shards += shard(tmp_path, captioned(4, 5), "c")
    shard(tmp_path, captioned(1), "b")
    index = build_index(shards, BYTES, "t2i")
    assert sorted(scanned) == ["b-000000.tar", "c-000000.tar"]
    assert [document.key for document in index.documents] == [f"s{n:03d}" for n in (0, 1, 2, 0, 5, 6, 7, 8)]


def test_an_interrupted_run_goes_on(tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [*shard(tmp_path, captioned(1)), *shard(tmp_path, captioned(1, 1), "b")]
    save = module.index_cache.save

    def saves_one(path: Path, scan: object) -> None:
        if path.name.startswith("b"):
            raise KeyboardInterrupt
        save(path, scan)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.index_cache, "save", saves_one)
        build_index(shards, BYTES, "t2i")
    scanned.clear()
    assert len(build_index(shards, BYTES, "t2i").documents) == 2
    assert scanned == ["b-000000.tar"]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-9],
    "altered": lambda data: data.replace(b"caption!", b"caption?"),
    "other lengths": lambda data: data.replace(b'"keys_B": 12', b'"keys_B": 13'),
    "empty": lambda data: b"",
    "something else": lambda data: b"7\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_built_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    shards = shard(tmp_path, captioned(3))
    fresh = build_index(shards, BYTES, "t2i")
    (cache,) = (tmp_path / ".index").iterdir()
    sound = cache.read_bytes()
    cache.write_bytes(DAMAGES[damage](sound))
    assert cache.read_bytes() != sound
    assert build_index(shards, BYTES, "t2i").documents == fresh.documents
    assert f"index cache {cache} is damaged" in caplog.text
    assert cache.read_bytes() == sound


def test_a_changed_shard_is_indexed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = shard(tmp_path, captioned(3))
    build_index(shards, BYTES, "t2i")
    size = shards[0].stat().st_size
    shard(tmp_path, captioned(3, first=5))
    assert shards[0].stat().st_size == size
    assert sizes(build_index(shards, BYTES, "t2i"))[0] == ("s005", 12, 14, 13)
    assert f"{shards[0]} changed since it was indexed (same size, other contents): indexing again" in caplog.text
    shard(tmp_path, captioned(30))
    assert len(build_index(shards, BYTES, "t2i").documents) == 30
    assert f"bytes, were {size}): indexing again" in caplog.text


def test_a_shard_that_was_only_touched_is_not_scanned(tmp_path: Path, scanned: list[str]) -> None:
    shards = shard(tmp_path, captioned(3))
    first = build_index(shards, BYTES, "t2i")
    scanned.clear()
    os.utime(shards[0], ns=(0, 1234567890))
    assert same(build_index(shards, BYTES, "t2i"), first)
    digest = module.index_cache._digest
    module.index_cache._digest = lambda _: pytest.fail("its contents are read again")  # type: ignore[assignment]
    try:
        build_index(shards, BYTES, "t2i")
    finally:
        module.index_cache._digest = digest
    assert not scanned


def test_contents_are_compared_on_demand(tmp_path: Path, scanned: list[str]) -> None:
    """A change that leaves size and time as they were."""
    shards = shard(tmp_path, captioned(3))
    build_index(shards, BYTES, "t2i")
    state = shards[0].stat()
    shards[0].write_bytes(shards[0].read_bytes().replace(b"caption!", b"Caption?"))
    os.utime(shards[0], ns=(state.st_atime_ns, state.st_mtime_ns))
    scanned.clear()
    assert build_index(shards, BYTES, "t2i").documents[1].texts[0].source == "caption!"
    assert not scanned
    assert build_index(shards, BYTES, "t2i", check=True).documents[1].texts[0].source == "Caption?"
    assert scanned == ["a-000000.tar"]


class Characters(ByteTokenizer):
    """Another tokenizer: ids are code points."""

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    def fingerprint(self) -> str:
        return "characters"


def test_other_ways_of_looking_do_not_share_a_cache(tmp_path: Path, scanned: list[str]) -> None:
    shards = write_shards(tmp_path, "a", [("a", {"txt": "äöü".encode()})], 1)
    for _ in range(2):
        kinds = (ByteTokenizer(), Characters())
        assert [build_index(shards, kind, "text").documents[0].texts[0].n_ids for kind in kinds] == [6, 3]
    assert len(scanned) == 2


def test_a_cache_knows_the_folder_of_the_images_it_was_made_with(tmp_path: Path, scanned: list[str]) -> None:
    """The same line of JSONL names another picture in another folder; shard and folder may move together."""
    for side, folder in ((8, "here"), (9, "there")):
        (tmp_path / "all" / folder).mkdir(parents=True)
        (tmp_path / "all" / folder / "0.png").write_bytes(file_of(noise(side, side)))
    items = [{"type": "text", "text": "a"}, {"type": "image", "name": "0.png"}]
    (tmp_path / "all" / "here" / "a.jsonl").write_text(json.dumps({"items": items}) + "\n")
    (tmp_path / "all" / "there" / "0.jsonl").write_text(json.dumps({"items": items}) + "\n")

    def widths(root: Path, *names: str) -> list[int]:
        index = build_index([root / name for name in names], BYTES, "t2i")
        for document in index.documents:
            index.read(document.images[0].member)
        return [document.images[0].width for document in index.documents]

    assert widths(tmp_path / "all", "here/a.jsonl") == [8]
    assert widths(tmp_path / "all", "there/0.jsonl", "here/a.jsonl") == [9, 9]
    assert len(scanned) == 3
    (tmp_path / "all").rename(tmp_path / "moved")
    assert widths(tmp_path / "moved", "there/0.jsonl", "here/a.jsonl") == [9, 9]
    assert len(scanned) == 3


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = shard(tmp_path, captioned(1))
    with caplog.at_level(logging.WARNING):
        index = build_index(shards, BYTES, "t2i", cache=shards[0] / "below-a-file")
    assert len(index.documents) == 1
    assert "cannot be written" in caplog.text

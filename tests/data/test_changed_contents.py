"""Shards restored with their old size and times but other contents: found by checksum, lost by name, not trained on."""

import json
import os
from pathlib import Path

import pytest

from megabagel.data.documents import SampleError
from megabagel.data.formats.shards import write_shards
from megabagel.data.index.index import build_index
from megabagel.data.tokenize.tokenizer import ByteTokenizer
from tests.support.pictures import file_of, noise

BYTES = ByteTokenizer()


def swap(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes of a file and keep size and times, as `rsync -a` of another version would."""
    about, data = path.stat(), path.read_bytes()
    assert len(old) == len(new) and data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def bmp(seed: int) -> bytes:
    return file_of(noise(16, 16, seed=seed), "BMP")


LONG, OTHER = b"long text " * 200, b"lang text " * 200


def test_an_image_of_a_tar_and_a_long_text(tmp_path: Path) -> None:
    (shard,) = write_shards(
        tmp_path, "a", [("p", {"bmp": bmp(0), "txt": b"p"}), ("t", {"bmp": bmp(1), "txt": LONG})], 9
    )
    build_index([shard], BYTES, "t2i")
    swap(shard, bmp(0), bmp(2))
    swap(shard, LONG, OTHER)
    index = build_index([shard], BYTES, "t2i")  # size and times are those on record
    one, two = index.documents
    assert index.text(one.texts[0]) == "p" and index.image(two.images[0]) == bmp(1)
    for read in (lambda: index.image(one.images[0]), lambda: index.text(two.texts[0])):
        with pytest.raises(SampleError, match="changed since it was indexed"):
            read()


def test_a_record_and_a_loose_image(tmp_path: Path) -> None:
    (tmp_path / "0.bmp").write_bytes(bmp(0))
    line = {"image": "0.bmp", "text": LONG.decode()}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    build_index([tmp_path / "a.jsonl"], BYTES, "t2i")
    swap(tmp_path / "0.bmp", bmp(0), bmp(1))
    swap(tmp_path / "a.jsonl", LONG, OTHER)
    index = build_index([tmp_path / "a.jsonl"], BYTES, "t2i")
    with pytest.raises(SampleError, match="changed since"):
        index.image(index.documents[0].images[0])
    with pytest.raises(SampleError, match="changed since"):
        index.text(index.documents[0].texts[0])

import json
import logging
import resource
from collections import Counter
from pathlib import Path

import pytest

from megabagel.config.schema import DataConfig, SourceConfig
from megabagel.data.documents import Document, ImageItem, TextItem
from megabagel.data.files import OPEN_FILES
from megabagel.data.formats.shards import write_shards
from megabagel.data.index import index as module
from megabagel.data.index.index import Index, build_index, find_shards, index_source
from megabagel.data.tokenize.tokenizer import ByteTokenizer
from megabagel.errors import UserError
from tests.support.pictures import BAD, ODD, file_of, noise

BYTES = ByteTokenizer()

Samples = list[tuple[str, dict[str, bytes]]]


def captioned(count: int, first: int = 0) -> Samples:
    """Samples whose captions and sizes all differ."""
    return [
        (f"s{i:03d}", {"png": file_of(noise(8 + i, 9 + i)), "txt": b"caption" + b"!" * i})
        for i in range(first, first + count)
    ]


def shard(folder: Path, samples: Samples, name: str = "a") -> list[Path]:
    return write_shards(folder, name, samples, 1000)


def sizes(index: Index) -> list[tuple[str, int, int, int]]:
    """(key, ids, height, width) of captioned images."""
    return [(d.key, d.texts[0].n_ids, d.images[0].height, d.images[0].width) for d in index.documents]


def test_every_size_and_every_byte_is_found(tmp_path: Path) -> None:
    samples = captioned(5)
    index = build_index(shard(tmp_path, samples), BYTES, "t2i")
    assert sizes(index) == [(f"s{i:03d}", 7 + i, 9 + i, 8 + i) for i in range(5)]
    for document, (_, files) in zip(index.documents, samples, strict=True):
        text, image = document.items
        assert isinstance(text, TextItem) and isinstance(image, ImageItem)
        assert (text.role, image.role) == ("condition", "target")
        assert index.text(text).encode() == files["txt"]
        assert index.read(image.member) == files["png"]
    assert str(index) == "samples: 5, skipped: 0, shards: 1"


def test_order_is_by_shard_then_by_place_in_the_tar(tmp_path: Path) -> None:
    for name, first in (("b", 0), ("a", 6), ("c", 3)):
        shard(tmp_path, captioned(3, first)[::-1], name)
    index = build_index(find_shards(tmp_path, "*.tar"), BYTES, "i2t")
    assert [document.key for document in index.documents] == [f"s00{i}" for i in (8, 7, 6, 2, 1, 0, 5, 4, 3)]
    for document in index.documents:
        image = document.images[0]
        assert index.read(image.member) == file_of(noise(image.width, image.height))


def test_odd_images_are_used_and_bad_ones_counted(tmp_path: Path) -> None:
    files = {name: data for name, (data, _) in ODD.items()} | {name: data for name, (data, _) in BAD.items()}
    samples = [(name.split(".")[0], {name.split(".")[1]: data, "txt": b"x"}) for name, data in sorted(files.items())]
    keys = Counter(key for key, _ in samples)
    samples = [(f"{key}-{next(iter(content))}", content) for key, content in samples]
    assert len(keys) < len(samples) == 30
    index = build_index(shard(tmp_path, samples), BYTES, "i2t")
    shown = {document.key: (document.images[0].height, document.images[0].width) for document in index.documents}
    assert shown == {name.replace(".", "-"): size for name, (_, size) in ODD.items()}
    reasons = {skip.key: skip.reason for skip in index.skipped}
    assert reasons == {name.replace(".", "-"): reason for name, (_, reason) in BAD.items()}
    assert {skip.shard for skip in index.skipped} == {"a-000000.tar"}


def test_other_faults_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    png = file_of(noise(8, 8))
    items = [{"type": "image", "name": "0.png"}, {"type": "text", "text": "b"}, {"type": "image", "name": "1.png"}]
    samples = [
        *captioned(1),
        ("mute", {"png": png}),
        ("latin", {"png": png, "txt": b"caf\xe9"}),
        ("blank", {"png": png, "txt": b"\n"}),
        ("broken", {"json": b"{"}),
        ("bad-frame", {"json": json.dumps({"items": items}).encode(), "0.png": png, "1.png": png[:50]}),
        ("edit", {"json": json.dumps({"items": items}).encode(), "0.png": png, "1.png": png}),
        ("twice", {"png": png, "txt": b"a"}),
        ("twice", {"png": png, "txt": b"b"}),
        (".hidden", {"png": png, "txt": b"b"}),
    ]
    with caplog.at_level(logging.WARNING):
        index = build_index(shard(tmp_path, samples), BYTES, "t2i")
    assert [document.key for document in index.documents] == ["s000"]
    assert {skip.key: skip.reason for skip in index.skipped} == {
        "mute": "no caption",
        "latin": "caption is not UTF-8",
        "blank": "empty caption",
        "broken": "broken JSON",
        "bad-frame": "damaged image",
        "edit": "t2i: not one text and one image",
        "twice": "two files of one name",
    }
    assert "a-000000.tar: bad-frame: damaged image (1.png: " in "".join(map(str, index.skipped))
    assert "samples: 1, skipped: 7, shards: 1; 1 x " in caplog.text
    assert caplog.text.count("a-000000.tar: ") == module.NAMED_SKIPS


def test_an_interleaved_document(tmp_path: Path) -> None:
    first, last = file_of(noise(8, 9)), file_of(noise(10, 11), "JPEG")
    items = [
        {"type": "image", "name": "0.png"},
        {"type": "text", "text": "make it blue"},
        {"type": "text", "text": "so", "role": "target"},
        {"type": "image", "name": "1.jpg"},
    ]
    files = {"0.png": first, "json": json.dumps({"items": items}).encode(), "1.jpg": last}
    index = build_index(shard(tmp_path, [("e", files)]), BYTES, "edit")
    (document,) = index.documents
    assert [item.role for item in document.items] == ["condition", "condition", "target", "target"]
    assert [(image.height, image.width) for image in document.images] == [(9, 8), (11, 10)]
    assert [index.read(image.member) for image in document.images] == [first, last]
    assert [index.text(text) for text in document.texts] == ["make it blue", "so"]


def test_samples_that_do_not_suit_the_task_are_named_by_shard(tmp_path: Path) -> None:
    """Three shards of two samples; the second of each has no image."""
    notes: Samples = [(f"n{n}", {"txt": b"a note"}) for n in range(3)]
    samples = [sample for pair in zip(captioned(3), notes, strict=True) for sample in pair]
    index = build_index(write_shards(tmp_path, "a", samples, 2), BYTES, "t2i")
    assert [(skip.shard, skip.key) for skip in index.skipped] == [(f"a-00000{n}.tar", f"n{n}") for n in range(3)]


def test_long_texts_stay_in_the_shard(tmp_path: Path) -> None:
    long, short = "ä" * module.INLINE_BYTES, "ä" * (module.INLINE_BYTES // 2)
    shards = shard(tmp_path, [("long", {"txt": f" {long}\n".encode()}), ("short", {"txt": short.encode()})])
    for _ in range(2):  # the second time from the cache
        index = build_index(shards, BYTES, "text")
        one, two = index.documents[0].texts[0], index.documents[1].texts[0]
        assert not isinstance(one.source, str) and two.source == short
        assert (index.text(one), one.n_ids) == (long, 2 * module.INLINE_BYTES)
        assert index.text(two) == short


def test_a_cut_shard_gives_its_complete_samples(tmp_path: Path) -> None:
    samples = captioned(6)
    (path,) = shard(tmp_path, samples)
    whole = build_index([path], BYTES, "t2i")
    data = path.read_bytes()
    for length in range(3 * 1024, len(data), 509):
        path.write_bytes(data[:length])
        index = build_index([path], BYTES, "t2i")
        assert index.documents == whole.documents[: len(index.documents)]
        if len(index.documents) < 6:
            (skip,) = index.skipped
            assert (skip.key, skip.reason) in {(f"s00{i}", "damaged shard") for i in range(6)}


def test_one_scan_serves_several_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = shard(tmp_path, [*captioned(3), ("note", {"txt": b"a note"})])
    build_index(shards, BYTES, "t2i")
    monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("decoded again"))
    assert [document.key for document in build_index(shards, BYTES, "text").documents] == ["note"]
    index = build_index(shards, BYTES, "i2t")
    assert [[item.role for item in document.items] for document in index.documents] == [["look", "target"]] * 3
    assert [(skip.key, skip.reason) for skip in index.skipped] == [("note", "i2t: not one text and one image")]


class Characters(ByteTokenizer):
    """Another tokenizer: ids are code points."""

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    def fingerprint(self) -> str:
        return "characters"


def test_tokenizers_do_not_share_a_cache(tmp_path: Path) -> None:
    shards = shard(tmp_path, [("a", {"txt": "äöü".encode()})])
    lengths = [build_index(shards, kind(), "text").documents[0].texts[0].n_ids for kind in (ByteTokenizer, Characters)]
    assert lengths == [6, 3]


def test_the_fingerprint_is_of_the_documents(tmp_path: Path) -> None:
    def fingerprint(folder: str, samples: Samples, task: str = "t2i", per_shard: int = 9) -> str:
        (tmp_path / folder).mkdir()
        return build_index(write_shards(tmp_path / folder, folder, samples, per_shard), BYTES, task).fingerprint

    samples = captioned(4)
    first = fingerprint("a", samples)
    assert fingerprint("b", samples, per_shard=3) == first  # another place, another cut into shards
    reworded = [("s000", samples[0][1] | {"txt": b"Caption"}), *samples[1:]]
    others = [
        fingerprint("c", samples[::-1]),
        fingerprint("d", samples[:3]),
        fingerprint("e", reworded),
        fingerprint("f", samples, task="i2t"),
    ]
    assert len({first, *others}) == 5


def test_images_are_decoded_to_their_end(tmp_path: Path) -> None:
    jpeg = file_of(noise(64, 48), "JPEG")
    shards = shard(tmp_path, [*captioned(1), ("half", {"jpg": jpeg[: len(jpeg) // 2], "txt": b"x"})])
    assert sizes(build_index(shards, BYTES, "t2i")) == [("s000", 7, 9, 8)]


def test_a_lack_of_memory_is_no_fault_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the sample, nothing is kept on record, and the next start finds the image sound."""

    def full(image: object) -> object:
        raise MemoryError

    shards = shard(tmp_path, captioned(1))
    with monkeypatch.context() as patch:
        patch.setattr("megabagel.data.decode.headers.to_rgb", full)
        with pytest.raises(UserError, match=r"a-000000\.tar: s000: no memory left to decode it"):
            build_index(shards, BYTES, "t2i")
    assert len(build_index(shards, BYTES, "t2i").documents) == 1


def test_many_files_may_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 300), hard))
        build_index(shard(tmp_path, captioned(1)), BYTES, "t2i")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, OPEN_FILES), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_users_mistakes_with_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.tar: shard not found"):
        build_index([tmp_path / "gone.tar"], BYTES, "t2i")
    (tmp_path / "zero.tar").touch()
    with pytest.raises(UserError, match=r"zero\.tar: cannot be read as a shard"):
        build_index([tmp_path / "zero.tar"], BYTES, "t2i")
    shards = shard(tmp_path, captioned(2))
    with pytest.raises(UserError, match=r"no sample is usable for task 'text': .*2 x text: has images"):
        build_index(shards, BYTES, "text")


def test_a_source_of_a_config(tmp_path: Path) -> None:
    shard(tmp_path, captioned(2), "train")
    source = SourceConfig(name="s", path="train-*.tar", task="i2t")
    index = index_source(DataConfig(root=str(tmp_path), sources=(source,)), source, BYTES)
    assert [type(item) for item in index.documents[0].items] == [ImageItem, TextItem]
    assert isinstance(index.documents[0], Document)

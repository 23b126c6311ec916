"""Parquet in the released layouts: rows in order, cells by place, columns held up to a bound."""

import json
import sys
from pathlib import Path
from threading import Barrier
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megabagel.data.documents import Cell, Passage, TextItem
from megabagel.data.formats import parquet
from megabagel.data.index import index as module
from megabagel.data.index.index import Index, build_index
from megabagel.errors import UserError
from tests.data.test_index import BYTES
from tests.support.pictures import file_of, noise

INSTRUCTIONS = pa.list_(pa.list_(pa.string()))


def picture(n: int) -> bytes:
    return file_of(noise(10 + n, 20 + 2 * n))


def write(path: Path, table: dict[str, Any], group: int = 2) -> Path:
    pq.write_table(pa.table(table), path, row_group_size=group)
    return path


def captions(*rows: dict[str, Any]) -> list[str]:
    return [json.dumps(row) for row in rows]


def texts(index: Index) -> list[list[str]]:
    return [[index.text(text) for text in document.texts] for document in index.documents]


def pictures(index: Index) -> list[list[bytes]]:
    return [[index.read(image.member) for image in document.images] for document in index.documents]


def test_captioned_images(tmp_path: Path) -> None:
    """Seven rows in groups of three; columns in another order than the layout, and one more."""
    rows = [{"a": f"caption {n}"} | ({"b": "x" * n} if n > 2 else {}) for n in range(6)] + [{}]
    table = {"captions": captions(*rows), "id": list(range(7)), "image": [picture(n) for n in range(7)]}
    shard = write(tmp_path / "a.parquet", table, group=3)
    for _ in range(2):  # the second time from the cache
        index = build_index([shard], BYTES, "t2i")
        assert [document.key for document in index.documents] == [f"group {n // 3} row {n % 3}" for n in range(7)]
        expected = [[f"caption {n}", *(["x" * n] if n > 2 else [])] for n in range(6)] + [[" "]]
        assert texts(index) == expected
        assert [[text.n_ids for text in d.texts] for d in index.documents] == [[len(t) for t in ts] for ts in expected]
        assert [(d.images[0].width, d.images[0].height) for d in index.documents] == [
            (10 + n, 20 + 2 * n) for n in range(7)
        ]
        assert pictures(index) == [[picture(n)] for n in range(7)]
        assert index.documents[4].images[0].member == Cell(0, 1, 1, 2, -1, len(picture(4)))
    learned = build_index([shard], BYTES, "i2t").documents[3]
    assert [item.role for item in learned.items] == ["look", "target", "target"]


def test_chains_of_edits(tmp_path: Path) -> None:
    steps = [[["a", "b"]], [["c"], ["d", "e"]], [["f"], ["g"], ["h"]]]
    images = [[picture(3 * n + i) for i in range(len(row) + 1)] for n, row in enumerate(steps)]
    table = {"image_list": images, "instruction_list": pa.array(steps, INSTRUCTIONS)}
    index = build_index([write(tmp_path / "a.parquet", table)], BYTES, "edit")
    assert pictures(index) == images
    assert texts(index) == [["a", "b"], ["c", "c.", "d", "e"], ["f", "f. g.", "g", "g.", "h"]]
    assert [item.role for item in index.documents[1].items] == ["condition"] * 3 + ["target"] + ["condition"] * 2 + [
        "target"
    ]
    assert [text.joined for text in index.documents[2].texts] == [0, 2, 0, 1, 0]


def test_texts_short_and_long(tmp_path: Path) -> None:
    """A long text stays in the shard, also one that is made of two."""
    long = "ü" * module.INLINE_BYTES
    index = build_index([write(tmp_path / "a.parquet", {"text": ["one", long, "three"]})], BYTES, "text")
    assert texts(index) == [["one"], [long], ["three"]]
    assert index.documents[1].texts[0].source == Passage(Cell(0, 0, 1, 0, -1, 0), 0)
    steps = pa.array([[["f"], [long], ["h"]]], INSTRUCTIONS)
    edits = {"image_list": [[picture(i) for i in range(4)]], "instruction_list": steps}
    index = build_index([write(tmp_path / "b.parquet", edits)], BYTES, "edit")
    assert texts(index) == [["f", f"f. {long}.", long, f"{long}.", "h"]]
    assert [isinstance(text.source, Passage) for text in index.documents[0].texts] == [False, True, True, True, False]


def test_long_captions_stay_in_the_shard(tmp_path: Path) -> None:
    rows = captions({"a": "short", "b": "y" * 3000}, {"a": "z" * 2000})
    index = build_index(
        [write(tmp_path / "a.parquet", {"image": [picture(0), picture(1)], "captions": rows})], BYTES, "t2i"
    )
    assert texts(index) == [["short", "y" * 3000], ["z" * 2000]]
    assert isinstance(index.documents[1].texts[0], TextItem)
    assert not isinstance(index.documents[1].texts[0].source, str)


def test_faults_are_named_by_row_column_and_value(tmp_path: Path) -> None:
    images = [picture(0), None, b"", picture(3)[:60], picture(4), picture(5)]
    words = [*captions({"a": "good"}, {"a": "b"}, {"a": "b"}, {"a": "b"}, {"a": 4}), None]
    shard = write(tmp_path / "a.parquet", {"image": images, "captions": words}, group=4)
    index = build_index([shard], BYTES, "t2i")
    assert [document.key for document in index.documents] == ["group 0 row 0"]
    told = [str(skip) for skip in index.skipped]
    expected = [
        "a.parquet: group 0 row 1: invalid record (image: expected the bytes of an image, got None)",
        "a.parquet: group 0 row 2: zero bytes (image)",
        "a.parquet: group 0 row 3: damaged image (image: ",
        "a.parquet: group 1 row 0: invalid record (captions['a']: expected a text, got 4)",
        "a.parquet: group 1 row 1: invalid record (captions: expected a JSON object of captions, got None)",
    ]
    assert len(told) == 5 and all(line.startswith(start) for line, start in zip(told, expected, strict=True)), told


def test_faults_inside_lists(tmp_path: Path) -> None:
    table = {
        "image_list": [[picture(0), None], None, [], [picture(0), picture(1)], [picture(0), b"xyz"]],
        "instruction_list": pa.array([[["a"]], [["a"]], [["a"]], [["a", None]], [["a"]]], INSTRUCTIONS),
    }
    with pytest.raises(UserError) as caught:
        build_index([write(tmp_path / "a.parquet", table, group=5)], BYTES, "edit")
    assert "samples: 0, skipped: 5" in str(caught.value)
    table = {name: [*list(values)] for name, values in table.items()}
    index_file = write(
        tmp_path / "b.parquet",
        {
            "image_list": [*table["image_list"], [picture(0), picture(1)]],
            "instruction_list": pa.array([[["a"]], [["a"]], [["a"]], [["a", None]], [["a"]], [["ok"]]], INSTRUCTIONS),
        },
        group=9,
    )
    index = build_index([index_file], BYTES, "edit")
    assert texts(index) == [["ok"]]
    assert [(skip.reason, skip.detail) for skip in index.skipped] == [
        ("invalid record", "image_list[1]: expected the bytes of an image, got None"),
        ("invalid record", "image_list: expected a list that is not empty, got None"),
        ("invalid record", "image_list: expected a list that is not empty, got []"),
        ("invalid record", "instruction_list[0][1]: expected a text, got None"),
        ("not an image", "image_list[1]"),
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"picture": [b"a"], "captions": ["{}"]}, r"columns picture, captions; expected image\+captions, image_list"),
        ({"image": ["a.png"], "captions": ["{}"]}, r"column 'image' has type string; expected binary"),
        ({"image": [b"a"], "captions": [["a"]]}, r"column 'captions' has type list<.*string>; expected string"),
        (
            {"image_list": [[b"a"]], "instruction_list": [["a"]]},
            r"column 'instruction_list' has type list<.*>; expected list<list<string>>",
        ),
        ({"text": [1]}, "column 'text' has type int64; expected string"),
    ],
)
def test_wrong_columns(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.parquet: {message}"):
        build_index([write(tmp_path / "a.parquet", table)], BYTES, "t2i")


def test_large_types_are_the_same(tmp_path: Path) -> None:
    large = pa.large_list(pa.large_list(pa.large_string()))
    table = {
        "image_list": pa.array([[picture(0), picture(1)]], pa.large_list(pa.large_binary())),
        "instruction_list": pa.array([[["a"]]], large),
    }
    index = build_index([write(tmp_path / "a.parquet", table)], BYTES, "edit")
    assert (texts(index), pictures(index)) == ([["a"]], [[picture(0), picture(1)]])


def test_a_damaged_file(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.parquet", {"text": ["one", "two"]})
    data = shard.read_bytes()
    for damaged in (data[:-6], data[:10] + bytes(len(data) - 50) + data[-40:], b"PAR1"):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet"):
            build_index([shard], BYTES, "text")


def test_a_file_that_changes_while_it_is_in_use(tmp_path: Path) -> None:
    table = {"image": [picture(n) for n in range(3)], "captions": captions(*[{"a": "b"}] * 3)}
    shard = write(tmp_path / "a.parquet", table, group=3)
    index = build_index([shard], BYTES, "t2i")
    places = [document.images[0].member for document in index.documents]
    write(shard, {"image": [picture(9)] * 2, "captions": captions(*[{"a": "b"}] * 2)}, group=3)
    again = build_index([shard], BYTES, "t2i")
    with pytest.raises(UserError, match=r"a\.parquet: row group 0, row 0: \d+ bytes, not \d+\. The shard changed"):
        again.read(places[0])
    with pytest.raises(UserError, match=r"a\.parquet: no row 2 in row group 0\. The shard changed"):
        again.read(places[2])


def test_columns_are_held_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path / "a.parquet", {"text": [f"{n:0100d}" for n in range(40)]}, group=10)
    reader = parquet.ParquetReader([shard])
    reads: list[int] = []
    read = parquet.ParquetReader._read_column
    monkeypatch.setattr(
        parquet.ParquetReader, "_read_column", lambda self, *place: reads.append(place[1]) or read(self, *place)
    )
    size = reader.column(0, 0, 0).nbytes
    monkeypatch.setattr(parquet, "HELD_BYTES", 2 * size)

    def value(group: int, row: int) -> str:
        return reader.value(Cell(0, group, row, 0, -1, 0))

    order = [0, 0, 1, 0, 2, 0, 1, 3, 3]
    assert [int(value(group, n)) for n, group in enumerate(order)] == [10 * group + n for n, group in enumerate(order)]
    assert reads == [0, 1, 2, 1, 3]  # 2 takes the place of 1, 1 that of 2, 3 that of 0
    monkeypatch.setattr(parquet, "HELD_BYTES", 1)
    assert [int(value(2, 1)), int(value(2, 2))] == [21, 22]
    assert reads[5:] == [2]  # the column in use is held whatever its size


def test_a_cell_that_is_not_utf8_is_one_skipped_sample(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"tw\xff", b"three"])
    shard = write(tmp_path / "a.parquet", {"text": pa.StringArray.from_buffers(3, *raw.buffers()[1:])}, group=9)
    index = build_index([shard], BYTES, "text")
    assert texts(index) == [["one"], ["three"]]
    assert [str(skip) for skip in index.skipped] == ["a.parquet: group 0 row 1: text is not UTF-8 (text: byte 2)"]


def test_shards_scanned_at_once_read_each_column_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = []
    for name in "abcd":
        table = {"image": [picture(n) for n in range(12)], "captions": captions(*[{"a": "b"}] * 12)}
        shards.append(write(tmp_path / f"{name}.parquet", table, group=4))
    reads: list[tuple[int, int, int]] = []
    read, declare, together = parquet.ParquetReader._read_column, parquet.declare, Barrier(4)
    monkeypatch.setattr(
        parquet.ParquetReader, "_read_column", lambda self, *place: reads.append(place) or read(self, *place)
    )

    def in_step(*args: Any) -> Any:
        """A row of every shard at a time, so that all are under way together."""
        together.wait(30)
        return declare(*args)

    monkeypatch.setattr(parquet, "declare", in_step)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(parquet, "HELD_BYTES", len(picture(0)) * 6)
    assert len(build_index(shards, BYTES, "t2i").documents) == 48
    assert sorted(reads) == [(shard, group, column) for shard in range(4) for group in range(3) for column in range(2)]


def test_a_scan_holds_one_row_group(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.parquet", {"text": [str(n) for n in range(12)]}, group=3)
    reader = parquet.ParquetReader([shard])
    for number, _ in enumerate(parquet.rows(reader, 0)):
        assert list(reader._columns) == [(0, number // 3, 0)]


def test_pyarrow_is_asked_for_where_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path / "a.parquet", {"text": ["one"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"a\.parquet: reading parquet needs pyarrow .*: pip install 'pyarrow>=16'"):
        build_index([shard], BYTES, "text")

"""Manifest, index and safetensors headers that say what cannot be: each is refused by file and value, none hangs."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from megabagel.checkpoint.checksums import Sums
from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.checkpoint.index import Entry, StoredSlice, from_json, untiled
from megabagel.checkpoint.manifest import MANIFEST, own_checksum, read_manifest, write_manifest
from megabagel.config.schema import ModelConfig
from megabagel.errors import UserError

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a complete manifest of two small files."""
    made = tmp_path / "step_00000003"
    made.mkdir()
    for rank in range(2):
        (made / f"rank_0000{rank}.safetensors").write_bytes(b"numbers")
    grid = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 2}
    write_manifest(made, ModelConfig(), {}, step=3, grid=grid, ema=0.5, freeze=("vit",), seed=0)
    return made


def rewrite(folder: Path, change: Change) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    content.pop("checksum")
    (folder / MANIFEST).write_text(json.dumps({"checksum": own_checksum(content), **content}))


def test_a_manifest_is_read_back(folder: Path) -> None:
    found = read_manifest(folder)
    assert (found.step, found.ema, found.freeze, found.after) == (3, 0.5, ("vit",), None)


def rename(old: str, new: str) -> Change:
    return lambda content: content["files"].update({new: content["files"].pop(old)})


CHANGES: dict[str, Change] = {
    "step is negative": lambda m: m.update(step=-1),
    "step is text": lambda m: m.update(step="6"),
    "step is a float": lambda m: m.update(step=3.0),
    "step is huge": lambda m: m.update(step=10**30),
    "no format": lambda m: m.pop("format"),
    "format is null": lambda m: m.update(format=None),
    "format is true": lambda m: m.update(format=True),
    "grid pp 0": lambda m: m["grid"].update(pp=0),
    "grid negative": lambda m: m["grid"].update(dp=-2),
    "grid huge": lambda m: m["grid"].update(dp=10**6),
    "grid beyond the files": lambda m: m["grid"].update(dp=5000),
    "grid without an axis": lambda m: m["grid"].pop("cp"),
    "grid with another axis": lambda m: m["grid"].update(ep=1),
    "ema below 0": lambda m: m.update(ema=-1),
    "ema of 1": lambda m: m.update(ema=1.0),
    "ema is text": lambda m: m.update(ema="0.5"),
    "freeze of another kind": lambda m: m.update(freeze=["vit", 3]),
    "freeze is text": lambda m: m.update(freeze="vit"),
    "keys is text": lambda m: m.update(keys="1"),
    "seed is text": lambda m: m.update(seed="0"),
    "model has more": lambda m: m["model"].update(extra=1),
    "model is huge": lambda m: m["model"].update(layers=10**9),
    "model of text": lambda m: m["model"].update(hidden="32"),
    "model is a list": lambda m: m.update(model=[]),
    "model has a section for a number": lambda m: m["model"].update(layers={"a": 1}),
    "model has a number for a section": lambda m: m["model"].update(vit=3),
    "model has a list for a section": lambda m: m["model"].update(vit=[]),
    "versions is a list": lambda m: m.update(versions=["1"]),
    "file with NUL": rename("rank_00000.safetensors", "rank\0"),
    "file with a long name": rename("rank_00000.safetensors", "r" * 5000),
    "file with half a character": rename("rank_00000.safetensors", "\ud800"),
    "file above": rename("rank_00000.safetensors", "../rank"),
    "negative size": lambda m: m["files"]["rank_00000.safetensors"].update(size=-1, blocks=[]),
    "blocks of numbers": lambda m: m["files"]["rank_00000.safetensors"].update(blocks=[1]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_manifest_of_nonsense_is_refused(folder: Path, case: str) -> None:
    rewrite(folder, CHANGES[case])
    with pytest.raises(UserError, match="step_00000003"):
        read_manifest(folder)


@pytest.mark.parametrize("text", [b"[" * 50_000, b"{", b"[]", b"null", b"\xff\xfe", b'{"step": NaN}', b""])
def test_a_manifest_that_is_no_json_is_refused(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(UserError, match=MANIFEST):
        read_manifest(folder)


def test_a_fifo_in_the_folder_is_refused(folder: Path) -> None:
    import os

    os.mkfifo(folder / "extra")
    with pytest.raises(UserError, match="extra: neither a file nor a folder"):
        read_manifest(folder)


def boxes(*places: tuple[tuple[int, ...], tuple[int, ...]], shape: tuple[int, ...]) -> Entry:
    return Entry(torch.float32, shape, tuple(StoredSlice("f", at, size, 0) for at, size in places))


def test_boxes_tile_or_not() -> None:
    assert untiled(boxes(((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (1, 4)), shape=(3, 4))) is None
    assert "hold 8 numbers of 12" in str(untiled(boxes(((0, 0), (2, 4)), shape=(3, 4))))
    assert "overlap" in str(untiled(boxes(((0, 0), (2, 4)), ((1, 0), (2, 4)), shape=(3, 4))))
    # The right number of numbers, but one corner is there twice and another not at all.
    assert "overlap" in str(
        untiled(boxes(((0, 0), (2, 2)), ((1, 1), (2, 2)), ((0, 2), (1, 2)), ((2, 0), (1, 2)), shape=(3, 4)))
    )
    assert "9 dimensions" in str(untiled(boxes(((0,) * 9, (1,) * 9), shape=(1,) * 9)))


def test_an_index_of_many_boxes_is_judged_at_once() -> None:
    """Columns all share their rows: comparing pairs took a minute for so many."""
    columns = [((0, n), (4, 1)) for n in range(20_000)]
    assert untiled(boxes(*columns, shape=(4, 20_000))) is None
    columns[7] = ((0, 8), (4, 1))
    assert "overlap" in str(untiled(boxes(*columns, shape=(4, 20_000))))


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("weight/a", {"dtype": "F32", "shape": [2], "boxes": [["f", [0], [2], "0"]]}),
        ("weight/a", {"dtype": "F32", "shape": [2], "boxes": [["f", [-1], [2], 0]]}),
        ("weight/a", {"dtype": "F32", "shape": [2.0], "boxes": []}),
        ("weight/a", {"dtype": ["F32"], "shape": [2], "boxes": []}),
        ("weight/a", {"dtype": "F32", "shape": [10**30], "boxes": []}),
        ("weight/a", {"dtype": "F32", "shape": [2], "boxes": [["g", [0], [2], 0]]}),
        ("weight/\x1b[31m", {"dtype": "F32", "shape": [2], "boxes": [["f", [0], [2], 0]]}),
        ("nonsense/a", {"dtype": "F32", "shape": [2], "boxes": [["f", [0], [2], 0]]}),
        ("weight/a", 7),
    ],
)
def test_an_entry_of_nonsense_is_refused(key: str, entry: Any) -> None:
    with pytest.raises(UserError) as caught:
        from_json(Path("index.json"), {key: entry}, {"f": Sums(100, ("",))})
    assert "\x1b" not in str(caught.value)


# safetensors


def tensors(header: Any, data: bytes = bytes(8), raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return len(text).to_bytes(8, "little") + text + data


def entry(start: Any, stop: Any, dtype: str = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "overlap": tensors({"a": entry(0, 4), "b": entry(2, 6)}),
    "twice the same bytes": tensors({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "negative start": tensors({"a": entry(-4, 0), "b": entry(0, 8, shape=[2])}),
    "float offset": tensors({"a": entry(0.0, 4), "b": entry(4, 8)}),
    "a gap": tensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "not from the start": tensors({"a": entry(4, 8)}),
    "bytes behind": tensors({"a": entry(0, 4)}),
    "a name twice": tensors(None, raw=b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 8, shape=[2])).encode(),) * 2)),
    "backwards": tensors({"a": entry(8, 0, shape=[2])}),
    "shape of text": tensors({"a": entry(0, 8, shape=["2"])}),
    "negative shape": tensors({"a": entry(0, 8, shape=[-2])}),
    "bytes of an empty tensor": tensors({"a": entry(0, 8, shape=[0, 2])}),
    "huge shape": tensors({"a": entry(0, 8, shape=[2**62, 2**62])}),
    "dtype of no text": tensors({"a": entry(0, 8, dtype=["F32"], shape=[2])}),  # type: ignore[arg-type]
    "deep": tensors(None, raw=b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "deep objects": tensors(None, raw=b'{"a":' * 50_000),
    "NaN": tensors(None, raw=b'{"a": NaN}'),
    "a list": tensors([]),
    "half a character": tensors({"a": entry(0, 8, shape=[2]), "__metadata__": {"\ud800": "x"}}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_the_library_refuses_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "ema.safetensors"
    path.write_bytes(HEADERS[case])
    with pytest.raises(UserError, match=r"ema\.safetensors"):
        TensorFiles(path)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ema.safetensors"
    path.write_bytes(save({"b": torch.arange(3.0), "a": torch.arange(2), "empty": torch.zeros(0, 4)}))
    files = TensorFiles(path)
    assert files.names == ["a", "b", "empty"] and files.rows("b", 1, 3).tolist() == [1.0, 2.0]


SHARD_INDEXES = [
    b'{"weight_map": {"a": 7}}',
    b'{"weight_map": []}',
    b"[]",
    b"[" * 50_000,
    b'{"weight_map": {"a": "%s"}}' % (b"x" * 5000),
    b'{"weight_map": {"a": "../b"}}',
]


@pytest.mark.parametrize("text", SHARD_INDEXES)
def test_an_index_of_shards_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "ema.safetensors.index.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match="cannot be read as an index of shards"):
        TensorFiles(path)


def test_the_model_of_a_manifest_is_the_one_that_was_written(folder: Path) -> None:
    assert read_manifest(folder).model["vit.grid"] == asdict(ModelConfig())["vit"]["grid"]

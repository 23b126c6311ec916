"""Layouts that data sets have: the one that explains all fields is read, and what is left over is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from megabagel.data.formats.records import layout_of
from megabagel.data.formats.shards import write_shards
from megabagel.data.index.index import Index, build_index
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.errors import UserError
from tests.data.test_index import BYTES
from tests.data.test_jsonl import items, write
from tests.support.pictures import file_of, noise

PNG, JPEG = file_of(noise(8, 9)), file_of(noise(10, 11), "JPEG")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(JPEG)
    return tmp_path


def reasons(index: Index) -> dict[str, str]:
    return {skip.key: skip.reason for skip in index.skipped}


@pytest.mark.parametrize("image", ["image", "file_name", "image_path"])
@pytest.mark.parametrize("text", ["text", "caption", "prompt"])
def test_captioned_images_by_any_of_their_names(pictures: Path, image: str, text: str) -> None:
    shard = write(pictures / "metadata.jsonl", {image: "a.png", text: "a cat", "width": 8, "none": None})
    for _ in range(2):  # the second time from the cache
        index = build_index([shard], BYTES, "t2i")
        assert items(index) == [["a cat", (8, 9)]]
        assert index.unused == {"width": 1} and index.not_used() == "not used: width (1)"
    with pytest.raises(UserError, match="text: has images"):
        build_index([shard], BYTES, "text")


def test_the_layout_that_explains_most_fields_wins() -> None:
    assert layout_of({"text", "image"}) == ("image", "text")
    assert layout_of({"text", "id"}) == ("text",)
    assert layout_of({"conversations", "image", "text"}) == ("conversations",)
    assert layout_of({"image", "captions", "text", "caption"}) == ("image", "captions")
    assert layout_of({"images", "label"}) is None


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_messages(pictures: Path) -> None:
    part, picture = {"type": "text", "text": "What is it?"}, {"type": "image", "image": "a.png"}
    url = {"type": "image_url", "image_url": {"url": "b.png"}}
    shard = write(
        pictures / "a.jsonl",
        {"messages": [message("system", "Be brief."), message("user", [picture, part]), message("assistant", "A.")]},
        {"messages": [message("user", [url, part]), message("assistant", [{"type": "text", "text": "B."}])]},
        {"messages": [message("user", "<image>Which?"), message("assistant", "C.")], "images": ["a.png"]},
        {"messages": [message("user", [{"type": "image"}, part]), message("assistant", "D.")], "images": ["b.png"]},
        {"messages": [message("user", "no answer")]},
        {"messages": [message("tool", "x")]},
        {"messages": [message("user", [{"type": "audio"}]), message("assistant", "E.")]},
        {"messages": [message("user", [url]), message("assistant", "F.")], "images": ["a.png", "b.png"]},
    )
    index = build_index([shard], BYTES, "i2t")
    assert items(index) == [
        ["Be brief.", (8, 9), "What is it?", "A."],
        [(10, 11), "What is it?", "B."],
        [(8, 9), "Which?", "C."],
        [(10, 11), "What is it?", "D."],
        [(10, 11), "F."],
    ]
    assert set(reasons(index).values()) == {"no answer to learn", "invalid record"} and len(index.skipped) == 3


def test_a_question_is_neither_learned_nor_a_caption(pictures: Path) -> None:
    question = {"from": "human", "value": "<image> What is it?"}
    shard = write(pictures / "a.jsonl", {"conversations": [question], "image": "a.png"})
    for task in ("i2t", "t2i"):
        with pytest.raises(UserError, match="no answer to learn"):
            build_index([shard], BYTES, task)  # type: ignore[arg-type]
    declared = {"items": [{"type": "image", "name": "a.png"}, {"type": "text", "text": "a?", "role": "condition"}]}
    with pytest.raises(UserError, match="i2t: a declared role does not suit"):
        build_index([write(pictures / "b.jsonl", declared)], BYTES, "i2t")


def test_a_turn_without_an_image_is_taken_as_it_stands(pictures: Path) -> None:
    turns = [{"from": "human", "value": " <image> \n What? "}, {"from": "gpt", "value": "A."}]
    turns += [{"from": "human", "value": " And now?\n"}, {"from": "gpt", "value": " B.\n"}]
    index = build_index([write(pictures / "a.jsonl", {"conversations": turns, "image": "a.png"})], BYTES, "i2t")
    assert items(index) == [[(8, 9), "What?", "A.", " And now?\n", " B.\n"]]


@pytest.mark.parametrize("text", ['[{"text": "a"}]', '[\n {"text": "a"}\n]\n'])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_json_array_is_named_as_such(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="holds a JSON array, expected JSONL"):
        build_index([tmp_path / name], BYTES, "text")


# Tars


def test_files_beside_a_caption(tmp_path: Path) -> None:
    caption = b"a cat"
    samples: list[tuple[str, dict[str, bytes]]] = [
        ("jfif", {"jfif": JPEG, "txt": caption}),
        ("noname", {"image": PNG, "txt": caption}),
        ("heic", {"heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "txt": caption}),
        ("pair", {"input.jpg": JPEG, "output.jpg": JPEG, "txt": caption}),
        ("mask", {"png": PNG, "mask.png": PNG, "cls": b"7", "json": b"{}", "txt": caption}),
        ("record", {"png": PNG, "json": json.dumps({"caption": "in the record" * 200, "url": "x"}).encode()}),
        ("alone", {"txt": caption, "cls": b"1"}),
        ("22", {"05.png": PNG, "05.txt": caption}),
    ]
    shards = write_shards(tmp_path, "a", samples, 99)
    for _ in range(2):
        index = build_index(shards, BYTES, "t2i")
        assert [document.key for document in index.documents] == ["jfif", "noname", "mask", "record"]
        assert index.text(index.documents[3].texts[0]) == "in the record" * 200
        assert index.unused == {"mask.png": 1, "cls": 2, "json": 1, "url": 1}
    assert reasons(index) == {
        "heic": "not an image",
        "pair": "images with unknown names",
        "alone": "t2i: not one text and one image",
        "22": "neither image nor text",
    }
    assert "the key of a sample ends at the first dot" in str(index.skipped)
    texts = build_index(shards, BYTES, "text")
    assert [document.key for document in texts.documents] == ["alone"]


# Parquet


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("text", ["text", "caption", "prompt"])
def test_columns_of_captioned_images(tmp_path: Path, text: str) -> None:
    long = "b" * 2000
    images = pa.array(
        [{"bytes": PNG, "path": None}, {"bytes": JPEG, "path": "x"}, {"bytes": None, "path": "y"}], STRUCT
    )
    shard = parquet(tmp_path / "a.parquet", id=[1, 2, 3], image=images, **{text: ["a", long, "c"]})
    for _ in range(2):
        index = build_index([shard], BYTES, "t2i")
        assert items(index) == [["a", (8, 9)], [long, (10, 11)]]
        assert [index.image(document.images[0]) for document in index.documents] == [PNG, JPEG]
        assert index.unused == {"id": 3}
    assert reasons(index) == {"group 1 row 0": "invalid record"}
    with pytest.raises(UserError, match="text: has images"):
        build_index([shard], BYTES, "text")


def test_categories_and_lists_of_image_structs(tmp_path: Path) -> None:
    texts = pa.array(["one", "two", "one"]).dictionary_encode()
    assert items(build_index([parquet(tmp_path / "a.parquet", text=texts)], BYTES, "text")) == [
        ["one"],
        ["two"],
        ["one"],
    ]
    chain = pa.array([[{"bytes": PNG, "path": ""}, {"bytes": JPEG, "path": ""}]], pa.list_(STRUCT))
    shard = parquet(tmp_path / "b.parquet", image_list=chain, instruction_list=[[["make it blue"]]])
    index = build_index([shard], BYTES, "edit")
    assert items(index) == [[(8, 9), "make it blue", (10, 11)]]
    assert [index.image(image) for image in index.documents[0].images] == [PNG, JPEG]


def test_columns_that_are_there_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="columns are there twice: text"):
        build_index([tmp_path / "a.parquet"], BYTES, "text")


# Tokenizers


def test_dropout_of_a_tokenizer_is_switched_off(tmp_path: Path) -> None:
    model = tokenizers.models.BPE(dropout=0.5)
    made = tokenizers.Tokenizer(model)
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    made.train_from_iterator(["abababab cdcdcdcd"] * 50, tokenizers.trainers.BpeTrainer(special_tokens=special))
    made.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(str(tmp_path))
    assert len({tuple(loaded.encode("abababab cdcdcdcd")) for _ in range(50)}) == 1


@pytest.mark.parametrize("name", ["a.model", "a.json"])
def test_an_empty_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        load_tokenizer(str(tmp_path / name))

"""The builder from end to end on a small package of pages."""

import json
import tarfile
from pathlib import Path

import pytest
from build_web_documents import main

from megabagel.data.index.index import build_index, find_shards
from megabagel.data.tokenize.tokenizer import load_tokenizer
from tests.tools.conftest import SENTENCE


def build(pages: Path, out: Path) -> int:
    return main(["--pages", str(pages), "--out", str(out)])


def documents(shard: Path) -> dict[str, list[dict[str, str]]]:
    with tarfile.open(shard) as tar:
        read = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return {name[:-5]: json.loads(data)["items"] for name, data in read.items() if name.endswith(".json")}


def test_pages_become_documents_and_texts(pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert build(pages, out) == 0
    report = " ".join(capsys.readouterr().out.split())
    assert "pages: 4, images on them: 10, in their main content: 9" in report
    assert "missing files 4 4 0 9 7 2" in report
    assert "samples: 2 documents" in report

    found = documents(out / "documents-000000.tar")
    first, second = found["000000-first"], found["000001-_ber"]
    assert [item["type"] for item in first] == ["image", "text"] * 4
    assert [item["role"] for item in first] == ["condition", *["target"] * 7]  # nothing precedes the first image
    assert first[1]["text"] == SENTENCE[3:-4]
    assert [item.get("name") for item in second] == [None, "0.jpg", None, "1.png", "2.png"]
    assert {item["role"] for item in second} == {"target"}

    tokenizer = load_tokenizer(str(out))
    index = build_index(find_shards(out, "documents-*.tar"), tokenizer, "interleave")
    assert [(image.height, image.width) for image in index.documents[1].images] == [(200, 160), (160, 200), (160, 200)]
    texts = build_index(find_shards(out, "texts-*.tar"), tokenizer, "text")
    written = [texts.text(document.texts[0]) for document in texts.documents]
    whole = [text for document, text in zip(texts.documents, written, strict=True) if "text" in document.key]
    assert "\n\n".join(whole) == "Title\n\n" + "\n\n".join([SENTENCE[3:-4]] * 200)
    assert max(map(len, written)) <= 2000 and len(whole) > 5


def test_equal_pages_give_equal_bytes(pages: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("a", "b")]
    assert [build(pages, out) for out in outs] == [0, 0]
    first, second = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outs)
    assert first == second and "tokenizer.json" in first


def test_mistakes_are_named(pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(tmp_path / "nothing", tmp_path / "out") == 2
    assert "apt-get install gimp-help-en" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "texts-000000.tar").write_bytes(b"")
    assert build(pages, tmp_path / "out") == 2
    assert "texts-000000.tar exists already" in capsys.readouterr().err
    for path in pages.rglob("*picture*"):
        path.unlink()
    assert build(pages, tmp_path / "other") == 2
    message = capsys.readouterr().err
    assert "no documents are left" in message and "too few images" in message
    assert not list(tmp_path.glob("other/*"))

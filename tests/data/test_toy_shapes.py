import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megabagel.config.schema import DataConfig
from megabagel.data.builders import toy_shapes
from megabagel.data.builders.toy_figures import COLOURS, PAPER, Figure, draw
from megabagel.data.builders.toy_shapes import ensure_dataset, write_shapes
from megabagel.data.documents import ImageItem
from megabagel.data.index.index import Index, build_index, find_shards
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.errors import UserError
from megabagel.sequence.items import SPECIAL_TOKENS

SAMPLES = 200


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, samples=SAMPLES, size=64, seed=3)
    return folder


def index(root: Path, kind: str, task: str) -> Index:
    return build_index(find_shards(root, f"{kind}-*.tar"), load_tokenizer(str(root)), task, cache=root / "cache")


def seen(pixels: np.ndarray) -> tuple[str, float, np.ndarray]:
    """What an image shows, without the drawing code: nearest colour, centre (share of the width), mask of the shape."""
    levels = pixels.astype(int)
    mask = np.abs(levels - PAPER).max(axis=2) > 60
    colour = min(COLOURS, key=lambda name: np.abs(np.median(levels[mask], axis=0) - COLOURS[name]).sum())
    return colour, float(np.nonzero(mask)[1].mean() / pixels.shape[1]), mask


def shape_of(mask: np.ndarray) -> str:
    """A shape by the share of its box that it fills: square 1, circle pi/4, triangle 1/2."""
    rows, columns = np.nonzero(mask)
    share = mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    return min({"square": 1.0, "circle": 0.785, "triangle": 0.5}.items(), key=lambda pair: abs(pair[1] - share))[0]


def describe(pixels: np.ndarray) -> str:
    colour, x, mask = seen(pixels)
    place = "on the left" if x < 0.38 else "on the right" if x > 0.62 else "in the middle"
    return f"a {colour} {shape_of(mask)} {place}"


def pixels(index: Index, item: ImageItem) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(index.read(item.member))).convert("RGB"))


def test_captions_say_what_the_pictures_show(root: Path) -> None:
    scenes = index(root, "scenes", "t2i")
    captions = [scenes.text(document.texts[0]) for document in scenes.documents]
    assert captions == [describe(pixels(scenes, document.images[0])) for document in scenes.documents]
    assert len(captions) == SAMPLES and len(set(captions)) > 35  # of 45


def test_formats_and_layouts_vary(root: Path) -> None:
    scenes = index(root, "scenes", "t2i")
    sizes = Counter((document.images[0].width, document.images[0].height) for document in scenes.documents)
    assert sizes.keys() == {(64, 64), (64, 48), (80, 64)} and sizes[64, 64] > SAMPLES / 2
    heads = Counter(scenes.read(document.images[0].member)[:2] for document in scenes.documents)
    assert heads.keys() == {b"\xff\xd8", b"\x89P"} and min(heads.values()) > SAMPLES / 4


def test_edits_do_what_they_say(root: Path) -> None:
    edits = index(root, "edits", "edit")
    assert edits.documents == index(root, "edits", "interleave").documents
    kinds: Counter[str] = Counter()
    for document in edits.documents:
        shown = [describe(pixels(edits, image)) for image in document.images]
        texts = [edits.text(text) for text in document.texts if text.role == "condition"]
        assert len(shown) == len(texts) + 1
        kinds[f"{len(shown)} images"] += 1
        for before, instruction, after in zip(shown[:-1], texts, shown[1:], strict=True):
            assert before != after
            verb, new = instruction.split()[0], instruction.split()[-1]
            kinds[verb] += 1
            changed = {"make": 1, "turn": 2, "move": -1}[verb]
            assert after.split()[changed] == new and instruction.split()[2] == before.split()[2]
            assert sum(a != b for a, b in zip(before.split(), after.split(), strict=True)) <= 1 + (verb == "move")
        thoughts = [edits.text(text) for text in document.texts if text.role == "target"]
        assert thoughts in ([], [f"so there will be {shown[-1]}"])
        kinds["thought"] += len(thoughts)
    assert kinds.keys() == {"2 images", "3 images", "make", "turn", "move", "thought"}
    assert sum(kinds[f"{n} images"] for n in (2, 3)) == SAMPLES // 2


def test_clips_move_steadily(root: Path) -> None:
    clips = index(root, "clips", "video")
    assert len(clips.documents) == SAMPLES // 4
    for document in clips.documents:
        views = [seen(pixels(clips, image)) for image in document.images]
        places = np.array([x for _, x, _ in views])
        assert 4 <= len(views) <= 6
        assert np.ptp(np.diff(places)) < 0.03 and abs(places[-1] - places[0]) > 0.15
        first, last = (describe(pixels(clips, document.images[end])).split() for end in (0, -1))
        caption = f"a {first[1]} {first[2]} moves from the {first[-1]} to the {last[-1]}"
        assert clips.text(document.texts[0]) == caption and last[1:3] == first[1:3]


def test_notes_and_the_tokenizer(root: Path) -> None:
    notes = index(root, "notes", "text")
    texts = [notes.text(document.texts[0]) for document in notes.documents]
    assert len(texts) == SAMPLES // 4 and all(text.endswith(".") for text in texts)
    tokenizer = load_tokenizer(str(root))
    assert tokenizer.vocab_size <= 512
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert len(tokenizer.encode("a purple triangle moves from the middle to the left")) == 10
    assert tokenizer.decode(tokenizer.encode("Zürich 🎉")) == "Zürich 🎉"


def test_the_seed_decides_every_byte(root: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "same", samples=SAMPLES, size=64, seed=3)
    write_shapes(tmp_path / "other", samples=SAMPLES, size=64, seed=4)
    for path in (tmp_path / "same").iterdir():
        assert path.read_bytes() == (root / path.name).read_bytes()
    for kind in ("scenes", "edits", "clips", "notes"):
        name = f"{kind}-000000.tar"
        assert (tmp_path / "other" / name).read_bytes() != (root / name).read_bytes()


def test_size_is_a_parameter(tmp_path: Path) -> None:
    write_shapes(tmp_path, samples=40, size=32, seed=0)
    documents = index(tmp_path, "scenes", "i2t").documents
    assert {(d.images[0].width, d.images[0].height) for d in documents} == {(32, 32), (32, 24), (40, 32)}


def test_a_complete_data_set_is_left_alone(root: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in root.glob("*.tar")}
    write_shapes(root, samples=SAMPLES, size=64, seed=3)
    assert {path.name: path.stat().st_mtime_ns for path in root.glob("*.tar")} == before


def test_an_interrupted_data_set_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_shapes, "train_bpe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write_shapes(tmp_path, samples=8, size=32, seed=0)
    assert not list(tmp_path.iterdir())
    write_shapes(tmp_path, samples=8, size=32, seed=0)
    assert json.loads((tmp_path / "shapes.json").read_text())["samples"] == 8


def test_users_mistakes(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shapes\.json.*'seed': 3\}, expected .*'seed': 9\}.*data\.root"):
        write_shapes(root, samples=SAMPLES, size=64, seed=9)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written or read.*Make room"):
        write_shapes(tmp_path / "file", samples=8, size=32, seed=0)
    (tmp_path / "shapes.json").write_text("{broken")
    with pytest.raises(UserError, match="remove the folder"):
        write_shapes(tmp_path, samples=8, size=32, seed=0)


def test_the_config_decides_whether_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(toy_shapes, "write_shapes", lambda root, **kwargs: calls.append((root, kwargs)))
    ensure_dataset(DataConfig(root=str(tmp_path), builder="none"))
    ensure_dataset(DataConfig(root=str(tmp_path), builder="shapes"))
    assert calls == [(tmp_path, {"samples": 4000, "size": 64, "seed": 0})]


@pytest.mark.parametrize(("shape", "area"), [("square", 4.0), ("circle", np.pi), ("triangle", 2.0)])
def test_a_shape_has_its_area(shape: str, area: float) -> None:
    page = np.asarray(draw(Figure("red", shape, "left", 0.4, 0.5, 0.2), 200, 100)).astype(float)
    cover = (PAPER[1] - page[..., 1]) / (PAPER[1] - COLOURS["red"][1])
    assert cover.sum() == pytest.approx(area * 20**2, rel=0.03)
    assert (cover.sum(axis=0) @ np.arange(200)) / cover.sum() == pytest.approx(80, abs=0.6)

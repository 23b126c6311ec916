"""Synthetic data set `shapes`: coloured shapes as JPEG and PNG files, small enough to be written on first use.

    scenes-*.tar     an image and a caption ("a red circle on the left"), for t2i and i2t
    edits-*.tar      before, instruction, after; some with a second step, some with a thought as a training target
    clips-*.tar      a caption and 4 to 6 frames of a moving shape
    notes-*.tar      texts about shapes
    tokenizer.json   a byte-level BPE trained on all the texts

Sample i of a kind depends only on (seed, kind, i).
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from megabagel.config.schema import DataConfig
from megabagel.data.builders.once import write_once
from megabagel.data.builders.scenes import write_scenes
from megabagel.data.builders.toy_figures import COLOURS, PLACES, SHAPES, Figure, draw, encode, pick, random_figure
from megabagel.data.formats.shards import write_shards
from megabagel.data.tokenize.bpe import train_bpe
from megabagel.sequence.keys import generator

MARKER = "shapes.json"
"""Marker file, written last; holds the parameters of the data set."""
VOCABULARY = 512
SAMPLES_PER_SHARD = 1000

FACTS = {
    "circle": "a circle is round and has no corners",
    "square": "a square has four equal sides and four corners",
    "triangle": "a triangle has three sides and three corners",
}

Files = dict[str, bytes]
"""{extension: bytes} of one sample."""


def ensure_dataset(data: DataConfig) -> None:
    """Write the data set that `data.builder` names into `data.root`, unless it exists already.

    Raises:
        UserError: see `write_once`.
    """
    if data.builder == "shapes":
        write_shapes(Path(data.root), samples=4000, size=64, seed=0)
    elif data.builder == "scenes":
        write_scenes(Path(data.root), samples=5000, size=64, seed=0)


def write_shapes(root: Path, *, samples: int, size: int, seed: int) -> None:
    """Write the data set and its tokenizer, unless it exists. Deterministic.

    Args:
        root: folder of the data set.
        samples: number of scenes; there are half as many edits, and a quarter as many clips and as many notes.
        size: side of most images in pixels; some are wider than high.
        seed: of all random draws.

    Raises:
        UserError: `root` holds a shape data set with other parameters, or cannot be written.
    """
    wanted = {"format": 1, "samples": samples, "size": size, "seed": seed}
    write_once(root / MARKER, "shape", wanted, lambda stage: _write(stage, samples, size, seed))


def _write(folder: Path, samples: int, size: int, seed: int) -> None:
    texts: list[str] = []
    for kind, make, count in (
        ("scenes", _scene, samples),
        ("edits", _edit, samples // 2),
        ("clips", _clip, samples // 4),
        ("notes", _note, samples // 4),
    ):
        made = [(f"{i:06d}", make(generator(seed, kind, i), size)) for i in range(count)]
        write_shards(folder, kind, made, SAMPLES_PER_SHARD)
        texts += [text for _, files in made for text in _texts(files)]
    (folder / "tokenizer.json").write_text(train_bpe(texts, VOCABULARY))


def _scene(rng: np.random.Generator, size: int) -> Files:
    figure = random_figure(rng)
    image = _image(rng, figure, *_page(rng, size))
    return {**image, "txt": str(figure).encode()}


def _edit(rng: np.random.Generator, size: int) -> Files:
    """Before, instruction, after; one in three has a second step, one in four has a thought before its last image."""
    steps = 1 + int(rng.random() < 1 / 3)
    thinks = rng.random() < 1 / 4
    page = _page(rng, size)
    figure = random_figure(rng)
    story: list[tuple[str | Figure, str]] = [(figure, "condition")]
    for step in range(steps):
        instruction, figure = _change(rng, figure)
        story.append((instruction, "condition"))
        if thinks and step == steps - 1:
            story.append((f"so there will be {figure}", "target"))
        story.append((figure, "target"))
    return _document(rng, story, page)


def _change(rng: np.random.Generator, figure: Figure) -> tuple[str, Figure]:
    """A random instruction, and the figure after it."""
    match pick(rng, ("colour", "shape", "place")):
        case "colour":
            colour = pick(rng, COLOURS, but=figure.colour)
            return f"make the {figure.shape} {colour}", replace(figure, colour=colour)
        case "shape":
            shape = pick(rng, SHAPES, but=figure.shape)
            return f"turn the {figure.shape} into a {shape}", replace(figure, shape=shape)
        case _:
            place = pick(rng, PLACES, but=figure.place)
            return f"move the {figure.shape} to the {place}", figure.moved(place)


def _clip(rng: np.random.Generator, size: int) -> Files:
    figure = random_figure(rng)
    place = pick(rng, PLACES, but=figure.place)
    frames = int(rng.integers(4, 7))
    caption = f"a {figure.colour} {figure.shape} moves from the {figure.place} to the {place}"
    moving = [(figure.moved(place, frame / (frames - 1)), "target") for frame in range(frames)]
    return _document(rng, [(caption, "condition"), *moving], _page(rng, size))


def _note(rng: np.random.Generator, size: int) -> Files:
    """Two to four sentences: figures, and facts about their shapes."""
    sentences = []
    for _ in range(int(rng.integers(1, 3))):
        figure = random_figure(rng)
        sentences += [f"there is {figure}", FACTS[figure.shape]]
    return {"txt": (". ".join(sentences) + ".").encode()}


def _page(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """Width and height: three in four pages are square, the others 4:3 and 5:4 (64 x 48, 80 x 64 for size 64)."""
    pages = [(size, size)] * 6 + [(size, size * 3 // 4), (size * 5 // 4, size)]
    return pages[rng.integers(len(pages))]


def _image(rng: np.random.Generator, figure: Figure, width: int, height: int, prefix: str = "") -> Files:
    """One image file, JPEG or PNG."""
    extension = pick(rng, ("jpg", "png"))
    return {prefix + extension: encode(draw(figure, width, height), extension)}


def _document(rng: np.random.Generator, story: Iterable[tuple[str | Figure, str]], page: tuple[int, int]) -> Files:
    """An interleaved document of texts and figures with their roles."""
    items: list[dict[str, str]] = []
    files: Files = {}
    for content, role in story:
        if isinstance(content, str):
            items.append({"type": "text", "text": content, "role": role})
        else:
            files |= _image(rng, content, *page, prefix=f"{len(files)}.")
            items.append({"type": "image", "name": list(files)[-1], "role": role})
    return {"json": json.dumps({"items": items}).encode(), **files}


def _texts(files: Files) -> list[str]:
    if "txt" in files:
        return [files["txt"].decode()]
    return [item["text"] for item in json.loads(files["json"])["items"] if item["type"] == "text"]

"""Batches without files: documents of drawn sizes for every source of a config, noise for pictures.

What is measured is the machine, not the disks: nothing is read, decoded or tokenized, all else is the real path. Sizes
are assumed: captions of 20 to 120 words, instructions of 10 to 60, texts of 200 to 1,000, clips of 4 to 8 frames, pages
of 3 to 6 pictures; sides of pictures between the bounds of `data.vae_resize`, aspects up to 3 : 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megabagel.config.schema import Config, ResizeConfig
from megabagel.data.decode import DecodeError, Request, Views
from megabagel.data.documents import (
    Document,
    ImageItem,
    ImageRole,
    Item,
    Loose,
    Place,
    Task,
    TextItem,
    TextRole,
    assign_roles,
)
from megabagel.data.formats.reader import Reader
from megabagel.data.index.index import Index
from megabagel.data.plan.global_plan import Source
from megabagel.rewards.regions import Region, Reward
from megabagel.sequence.keys import generator

DOCUMENTS = 2048
"""Per source."""


@dataclass(frozen=True)
class Bounds:
    """Upper limits of every document."""

    sides: ResizeConfig
    """Of pictures, pixels."""
    words: int
    """Of a text."""


@dataclass(frozen=True)
class NoFiles(Index):
    """An index of documents whose pictures are no files."""

    def read(self, place: Place) -> bytes:
        """Nothing: `noise` needs no bytes."""
        return b""


def synthetic_sources(config: Config) -> list[Source]:
    """The config's sources with drawn documents instead of their shards. The same seed draws the same ones."""
    return [
        Source(source.name, source.task, source.weight, _index(config, source.name, source.task))
        for source in config.data.sources
    ]


def _index(config: Config, name: str, task: Task) -> Index:
    draw = generator(config.train.seed, "synthetic", name)
    bounds = Bounds(config.data.vae_resize, (config.data.max_sample_tokens or config.data.max_tokens) // 2)
    documents = tuple(
        assign_roles(task, Document(f"{number:06d}", _ITEMS[task](draw, bounds))) for number in range(DOCUMENTS)
    )
    return NoFiles(documents, (), f"synthetic {name}", Reader((), Path()))


def _text(draw: np.random.Generator, bounds: Bounds, fewest: int, most: int, role: TextRole | None = None) -> TextItem:
    """A text that the byte tokenizer turns into as many ids as it has letters."""
    count = min(int(draw.integers(fewest, most + 1)), bounds.words)
    return TextItem(count, "x" * count, role)


def _image(draw: np.random.Generator, bounds: Bounds, role: ImageRole | None = None) -> ImageItem:
    sides = bounds.sides
    short = int(draw.integers(sides.min_size, sides.max_size + 1))
    long = min(sides.max_size, round(short * float(draw.uniform(1, 1.5))))
    height, width = (short, long) if draw.random() < 0.5 else (long, short)
    return ImageItem(height, width, Loose("", 0), role)


def _page(draw: np.random.Generator, bounds: Bounds) -> tuple[Item, ...]:
    """Texts and pictures in turn, all learned."""
    pairs = (
        (_text(draw, bounds, 40, 200, "target"), _image(draw, bounds, "target"))
        for _ in range(int(draw.integers(3, 7)))
    )
    return tuple(item for pair in pairs for item in pair)


def _clip(draw: np.random.Generator, bounds: Bounds) -> tuple[Item, ...]:
    """A caption and frames of one size."""
    frame = _image(draw, bounds)
    return _text(draw, bounds, 20, 120), *[frame] * int(draw.integers(4, 9))


_REWARD = Reward(tuple(Region((0, 0, 8 * n, 8 * n), n / 10) for n in range(1, 11)), 0.5)
_SCORES = TextItem(0, _REWARD.to_json(), "reward")

_ITEMS: dict[str, Callable[[np.random.Generator, Bounds], tuple[Item, ...]]] = {
    "t2i": lambda draw, bounds: (_text(draw, bounds, 20, 120), _image(draw, bounds)),
    "i2t": lambda draw, bounds: (_image(draw, bounds), _text(draw, bounds, 20, 120)),
    "edit": lambda draw, bounds: (_image(draw, bounds), _text(draw, bounds, 10, 60), _image(draw, bounds)),
    "video": _clip,
    "text": lambda draw, bounds: (_text(draw, bounds, 200, 1000),),
    "interleave": _page,
    # Ten regions, as the released pipeline keeps at most; their boxes lie in the corner of every picture.
    "reward": lambda draw, bounds: (_text(draw, bounds, 20, 120), _image(draw, bounds), _SCORES),
    "reconstruct": lambda draw, bounds: (_text(draw, bounds, 5, 20), _image(draw, bounds)),
}


def noise(requests: Sequence[Request]) -> list[Views | DecodeError]:
    """A decode engine without files: the same uniform noise, cut to every size."""
    most = max((height * width for request in requests for height, width in request.sizes), default=0)
    levels = torch.rand(3 * most, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return [
        [levels[: 3 * height * width].view(3, height, width).clone() for height, width in request.sizes]
        for request in requests
    ]

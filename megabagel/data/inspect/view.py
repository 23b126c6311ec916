"""What there is to see of a sample: its segments, the mask behind them, its texts as tokens, its images as pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from megabagel.config.schema import Config
from megabagel.data.decode import DecodeError, Request, choose_engine
from megabagel.data.documents import Document, ImageItem, SampleError, TextItem
from megabagel.data.plan.global_plan import Source
from megabagel.data.plan.planned_sample import Rules
from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.errors import UserError
from megabagel.sequence.items import Clip, Item, Latent, Text, Vit, item_tokens
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import PRIVATE, Pack, build_pack
from megabagel.sequence.sample import dropped_items, lay_out


class Kind(Enum):
    """What a segment is to the model."""

    READ = "text"
    LEARNED = "text, learned"
    SEEN = "ViT"
    CLEAN = "clean VAE"
    NOISED = "noised VAE"


@dataclass(frozen=True)
class SegmentView:
    """One item of the sample. `dropped`: conditioning dropout leaves it out, so it has no tokens.

    slots: places in the document (several for a clip). rows: its rows in the sequence. loss: how many of them bear
    loss. rope: first and last RoPE id. group: number of its private key and its chain, for noised segments. timestep:
    the normal draw behind its noise level. probability: of being dropped.
    """

    kind: Kind
    item: Item
    slots: tuple[int, ...]
    mode: str
    rows: slice
    loss: int
    rope: tuple[int, int]
    group: str
    timestep: float | None
    probability: float
    dropped: bool

    @property
    def tokens(self) -> int:
        """Tokens, delimiters included."""
        return self.rows.stop - self.rows.start


@dataclass(frozen=True)
class TextView:
    """A text as tokens, each written out on its own."""

    slot: int
    role: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Branch:
    """An image as the ViT or the VAE gets it: uint8 [height, width, 3], and rows and columns of its tokens."""

    name: str
    grid: tuple[int, int]
    pixels: np.ndarray


@dataclass(frozen=True)
class ImageView:
    """An image: its size on file (height, width), and what its branches get."""

    slot: int
    role: str
    size: tuple[int, int]
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class SampleView:
    """One visit of one sample. `contents` are in the order of the document."""

    key: SampleKey
    name: str
    task: str
    of: int
    segments: tuple[SegmentView, ...]
    pack: Pack
    contents: tuple[TextView | ImageView, ...]

    def kinds(self) -> list[Kind]:
        """The kind of every row of the sequence."""
        return [segment.kind for segment in self.segments for _ in range(segment.tokens)]


def view_sample(config: Config, source: Source, tokenizer: TextTokenizer, wanted: str) -> SampleView:
    """The first visit of sample `wanted` (a key, or a number from 0) of a source.

    Raises:
        UserError: there is no such sample, or one of its images cannot be decoded.
    """
    number = find_sample(source, wanted)
    document = source.index.documents[number]
    key = SampleKey(config.train.seed, source.name, number, 0)
    rules = Rules.of(config)
    items = rules.expander.items(document, source.task, key)
    dropped = dropped_items(items, key, rules.dropout)
    plan = lay_out(items, key, dropped, rules.advance_dropped)
    pack = build_pack([plan])
    segments = tuple(_segments(items, dropped, pack, rules))
    shown = {slot for segment in segments for slot in segment.slots}
    images = _images(config, source, document, segments)
    texts = {
        slot: TextView(slot, item.role or "", tuple(_written(tokenizer, _text(source, document, slot, item))))
        for slot, item in enumerate(document.items)
        if isinstance(item, TextItem) and slot in shown
    }
    contents: dict[int, TextView | ImageView] = {**texts, **images}
    total = len(source.index.documents)
    ordered = tuple(contents[slot] for slot in sorted(contents))
    return SampleView(key, document.key, source.task, total, segments, pack, ordered)


def find_sample(source: Source, wanted: str) -> int:
    """The number of a sample, by its key or its number from 0."""
    documents = source.index.documents
    for number, document in enumerate(documents):
        if document.key == wanted:
            return number
    if wanted.isdecimal() and int(wanted) < len(documents):
        return int(wanted)
    raise UserError(
        f"--sample {wanted}: source {source.name} has no sample of this key or number. Expected a number from 0 to "
        f"{len(documents) - 1} or a key such as {documents[0].key!r}."
    )


def _segments(items: list[Item], dropped: set[int], pack: Pack, rules: Rules) -> Iterator[SegmentView]:
    start, laid_out, latents = 0, iter(pack.samples[0].segments), iter(pack.latents)
    for number, item in enumerate(items):
        frames = item.frames if isinstance(item, Clip) else (item,)
        stop = start + (0 if number in dropped else item_tokens(item))
        rows = slice(start, stop)
        mode, group, timestep, rope = "", "", None, (0, 0)
        if number not in dropped:
            mode = next(laid_out).mode.name.lower()
            group = _group(int(pack.codes.key_code[start]), item)
            draws = [next(latents).raw_timestep for frame in frames if isinstance(frame, Latent)]
            timestep = draws[0] if draws and draws[0] != -np.inf else None
            rope = (int(pack.position_S[start]), int(pack.position_S[stop - 1]))
        yield SegmentView(
            *(_kind(item), item, tuple(frame.slot for frame in frames), mode, rows),
            loss=int(pack.ce_S[rows].sum() + pack.noised_S[rows].sum()),
            rope=rope,
            group=group,
            timestep=timestep,
            probability=rules.dropout.of(item),
            dropped=number in dropped,
        )
        start = stop


def _kind(item: Item) -> Kind:
    if isinstance(item, Text):
        return Kind.LEARNED if item.loss else Kind.READ
    if isinstance(item, Vit):
        return Kind.SEEN
    return Kind.NOISED if item.noised else Kind.CLEAN


def _group(code: int, item: Item) -> str:
    if code < PRIVATE:
        return ""
    chain = item.chain if isinstance(item, Clip) else None
    return str(code - PRIVATE) if chain is None else f"{code - PRIVATE} of chain {chain}"


def _written(tokenizer: TextTokenizer, text: str) -> Iterator[str]:
    return (tokenizer.decode([token]) for token in tokenizer.encode(text))


def _text(source: Source, document: Document, slot: int, item: TextItem) -> str:
    try:
        return source.index.text(item)
    except SampleError as error:
        told = f"{source.name}, sample {document.key}, item {slot}: {error}. Choose another --sample."
        raise UserError(told) from error


def _images(
    config: Config, source: Source, document: Document, segments: tuple[SegmentView, ...]
) -> dict[int, ImageView]:
    """The images of the sample by slot; a branch appears once, however often its pixels are used."""
    sides = {"VAE": config.model.latent_stride, "ViT": config.model.vit.patch}
    grids: dict[int, dict[str, tuple[int, int]]] = {}
    for segment in segments:
        for frame in segment.item.frames if isinstance(segment.item, Clip) else (segment.item,):
            if not isinstance(frame, Text):
                grids.setdefault(frame.slot, {})["ViT" if isinstance(frame, Vit) else "VAE"] = (frame.rows, frame.cols)
    views = {}
    for slot, wanted in grids.items():
        item = document.items[slot]
        assert isinstance(item, ImageItem)
        sizes = tuple((rows * sides[name], cols * sides[name]) for name, (rows, cols) in wanted.items())
        try:
            (outcome,) = choose_engine("host")([Request(source.index.image(item), sizes)])
            if isinstance(outcome, DecodeError):
                raise outcome
        except SampleError as error:
            told = f"{source.name}, sample {document.key}, item {slot}: {error}. Choose another --sample."
            raise UserError(told) from error
        pixels = zip(wanted.items(), outcome, strict=True)
        branches = tuple(Branch(name, grid, _levels(view)) for (name, grid), view in pixels)
        views[slot] = ImageView(slot, item.role or "", (item.height, item.width), branches)
    return views


def _levels(pixels: torch.Tensor) -> np.ndarray:
    """[3, h, w] in [-1, 1] as uint8 [h, w, 3]."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()

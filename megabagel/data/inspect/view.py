"""Data behind the views of a sample: its segments, its pack with the mask, texts as tokens, images as pixels.

Built by the same functions as a training batch (`plan/planned_sample.py`), so that the view shows what is trained on.
"""

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
    """Kinds of segments, by the loss or role of their tokens; the values are the names shown."""

    READ = "text"
    LEARNED = "text, learned"
    SEEN = "ViT"
    CLEAN = "clean VAE"
    NOISED = "noised VAE"


@dataclass(frozen=True)
class SegmentView:
    """One item of the sample as an attention segment.

    Args:
        kind: its kind.
        item: the sequence item.
        slots: indices into the items of the document (several for a clip).
        mode: attention mode, in lower case.
        rows: its rows in the sequence, delimiters included; empty if dropped.
        loss: number of its rows with loss.
        rope: first and last RoPE position.
        group: for noised segments, the number of its private key code, and its chain; else empty.
        timestep: raw normal draw from which its noise level follows; None for segments without noise.
        probability: probability of conditioning dropout.
        dropped: whether conditioning dropout removed it from this visit.
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
    """A text as tokens, each decoded by itself."""

    slot: int
    role: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Branch:
    """An image as the ViT or the VAE gets it: (rows, columns) of its token grid, and uint8 [height, width, 3]."""

    name: str
    grid: tuple[int, int]
    pixels: np.ndarray


@dataclass(frozen=True)
class ImageView:
    """An image: its (height, width) in pixels in the file, and its pixels as the ViT and the VAE get them."""

    slot: int
    role: str
    size: tuple[int, int]
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class SampleView:
    """One visit (use in one epoch) of a sample. `of`: samples of the source; `contents`: in document order."""

    key: SampleKey
    name: str
    task: str
    of: int
    segments: tuple[SegmentView, ...]
    pack: Pack
    contents: tuple[TextView | ImageView, ...]

    def kinds(self) -> list[Kind]:
        """Kind of every row of the sequence."""
        return [segment.kind for segment in self.segments for _ in range(segment.tokens)]


def view_sample(config: Config, source: Source, tokenizer: TextTokenizer, wanted: str) -> SampleView:
    """View of a sample in its first epoch.

    Args:
        config: the config of a run.
        source: the opened source.
        tokenizer: encodes and decodes texts.
        wanted: key of the sample, or its number, from 0.

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
    """Number of a sample, given its key or its number from 0; UserError if there is none."""
    documents = source.index.documents
    # Keys first: a key may consist of digits.
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
    """Images of the sample by slot; a branch (ViT or VAE) appears once, however often its pixels are used."""
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
            # The reference engine, whatever `data.decode` is: a view needs no GPU.
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
    """Convert [3, height, width] in [-1, 1] to uint8 [height, width, 3]."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()

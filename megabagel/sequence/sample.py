"""Sample plan: items to segments, RoPE ids, loss rows and noise seeds (docs/bagel.md#samples, #rope, #flow-time)."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from megabagel.sequence.items import DELIMITERS, Clip, Item, Latent, Mode, Text, Vit, item_tokens
from megabagel.sequence.keys import SampleKey

TEXT, VIT, LATENT = 0, 1, 2
"""Token kinds: text and image delimiters, ViT patches (both the understanding expert's), VAE latents (generation)."""


@dataclass(frozen=True)
class Dropout:
    """Probability that a droppable item is left out, by kind (BAGEL section 2.3)."""

    text: float = 0.0
    vit: float = 0.0
    latent: float = 0.0

    def of(self, item: Item) -> float:
        """Probability for one item; items that are not droppable have none."""
        if isinstance(item, Clip):
            return self.of(item.frames[0])
        if not item.droppable:
            return 0.0
        return {Text: self.text, Vit: self.vit, Latent: self.latent}[type(item)]


@dataclass(frozen=True)
class Segment:
    """A run of tokens under one rule of attention. `chain` joins the groups of one diffusion-forcing sequence."""

    mode: Mode
    length: int
    chain: int | None = None


@dataclass(frozen=True)
class LatentImage:
    """One run of latent tokens: whose image, its token grid, its draw u (-inf: clean) and the seed of its noise."""

    slot: int
    rows: int
    cols: int
    raw_timestep: float
    noise_seed: int

    @property
    def noised(self) -> bool:
        """Whether the image is generated, that is bears flow loss."""
        return self.raw_timestep != -np.inf


@dataclass
class SamplePlan:
    """One sample as it enters a pack: S tokens, from sizes alone.

    items: what was kept after conditioning dropout, in order.
    segments: attention runs, lengths sum to S.
    kind_S (uint8): TEXT, VIT or LATENT. position_S (int32): RoPE ids. ce_S (bool): rows whose next token is a target.
    vits: (slot, rows, cols) per ViT image. latents: per latent image. Both in token order.
    """

    key: SampleKey
    items: list[Item] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    vits: list[Vit] = field(default_factory=list)
    latents: list[LatentImage] = field(default_factory=list)
    kind_S: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    position_S: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    ce_S: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def tokens(self) -> int:
        """S."""
        return len(self.kind_S)


def plan_sample(items: list[Item], key: SampleKey, dropout: Dropout, advance_dropped: bool = True) -> SamplePlan:
    """Lay out one sample. Every droppable item is dropped on its own keyed draw."""
    return lay_out(items, key, dropped_items(items, key, dropout), advance_dropped)


def dropped_items(items: list[Item], key: SampleKey, dropout: Dropout) -> set[int]:
    """Numbers of the items that conditioning dropout leaves out (docs/bagel.md#conditioning-dropout)."""
    return {
        index
        for index, item in enumerate(items)
        if (probability := dropout.of(item)) > 0 and key.uniform("drop", index) < probability
    }


def lay_out(items: list[Item], key: SampleKey, dropped: Collection[int], advance_dropped: bool = True) -> SamplePlan:
    """Lay out one sample without the items whose numbers are in `dropped`.

    A dropped image still moves the RoPE counter by one when `advance_dropped` (the released code does;
    docs/bagel.md#rope); dropped text never moves it.
    """
    plan = SamplePlan(key)
    kinds, positions, losses = [], [], []
    counter = 0
    for index, item in enumerate(items):
        if index in dropped:
            counter += int(advance_dropped and not isinstance(item, Text))
            continue
        plan.items.append(item)
        if isinstance(item, Clip):
            plan.segments.append(Segment(item.mode, item_tokens(item), item.chain))
        else:
            plan.segments.append(Segment(_mode(item), item_tokens(item)))
        for kind, position, loss, after in _tokens(item, counter):
            kinds.append(kind)
            positions.append(position)
            losses.append(loss)
            counter = after
        _register_images(plan, item, index)
    if kinds:
        plan.kind_S = np.concatenate(kinds)
        plan.position_S = np.concatenate(positions)
        plan.ce_S = np.concatenate(losses)
    return plan


def _mode(item: Text | Vit | Latent) -> Mode:
    if isinstance(item, Text):
        return Mode.CAUSAL
    return Mode.NOISE if isinstance(item, Latent) and item.noised else Mode.FULL


def _tokens(item: Item, counter: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Yield (kinds, positions, loss flags, counter after) for each text or image of the item."""
    if isinstance(item, Text):
        length = item.length + DELIMITERS
        loss = np.zeros(length, bool)
        loss[: length - 1] = item.loss  # bos .. last id predict first id .. eos; eos itself predicts nothing
        yield np.full(length, TEXT, np.uint8), counter + np.arange(length, dtype=np.int32), loss, counter + length
        return
    frames = item.frames if isinstance(item, Clip) else (item,)
    steps = item.steps if isinstance(item, Clip) else (None,)
    for frame, step in zip(frames, steps, strict=True):
        kind = np.full(item_tokens(frame), VIT if isinstance(frame, Vit) else LATENT, np.uint8)
        kind[[0, -1]] = TEXT
        position = np.full(len(kind), counter, np.int32)
        if step is None:  # a clean copy that follows a noised image takes the same id
            step = int(not (isinstance(frame, Latent) and frame.noised))
        counter += step
        yield kind, position, np.zeros(len(kind), bool), counter


def _register_images(plan: SamplePlan, item: Item, index: int) -> None:
    if isinstance(item, Vit):
        plan.vits.append(item)
    elif isinstance(item, Latent | Clip):
        frames = item.frames if isinstance(item, Clip) else (item,)
        raw = float(plan.key.generator("timestep", index).standard_normal())  # one draw for all frames of a clip
        for number, frame in enumerate(frames):
            timestep = raw if frame.noised else -np.inf
            seed = plan.key.seed64("noise", index, number)
            plan.latents.append(LatentImage(frame.slot, frame.rows, frame.cols, timestep, seed))

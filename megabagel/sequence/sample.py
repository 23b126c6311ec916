"""Layout of one sample: items to segments, RoPE ids, loss rows and noise seeds.

The rules are those of docs/bagel.md#samples, #rope, #conditioning-dropout and #flow-time.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from megabagel.sequence.items import DELIMITERS, Clip, Item, Latent, Mode, Text, Vit, item_tokens
from megabagel.sequence.keys import SampleKey

TEXT, VIT, LATENT = 0, 1, 2
"""Token kinds. TEXT (delimiters of images included) and VIT use the understanding expert, LATENT the generation one."""


@dataclass(frozen=True)
class Dropout:
    """Conditioning dropout: probability that a droppable item is left out, by kind (BAGEL section 2.3)."""

    text: float = 0.0
    vit: float = 0.0
    latent: float = 0.0

    def of(self, item: Item) -> float:
        """Return the probability for one item; 0 for items that are not droppable. A clip follows its first frame."""
        if isinstance(item, Clip):
            return self.of(item.frames[0])
        if not item.droppable:
            return 0.0
        return {Text: self.text, Vit: self.vit, Latent: self.latent}[type(item)]


@dataclass(frozen=True)
class Segment:
    """A run of tokens under one attention mode; segments of equal `chain` form one diffusion-forcing sequence."""

    mode: Mode
    length: int
    chain: int | None = None


@dataclass(frozen=True)
class LatentImage:
    """One use of an image's latents in a sample."""

    slot: int
    """Index of the image in the document."""
    rows: int
    cols: int
    raw_timestep: float
    """Normal draw u behind the timestep (docs/bagel.md#flow-time); -inf for a clean image."""
    noise_seed: int
    constraint_slot: int | None = None
    """See `items.Latent`."""

    @property
    def noised(self) -> bool:
        """Whether the image is generated, that is, bears the flow loss."""
        return self.raw_timestep != -np.inf


@dataclass
class SamplePlan:
    """Token layout of one sample, computed from sizes alone."""

    key: SampleKey
    items: list[Item] = field(default_factory=list)
    """The items left after conditioning dropout, in order."""
    segments: list[Segment] = field(default_factory=list)
    """Attention segments in order; their lengths sum to S."""
    vits: list[Vit] = field(default_factory=list)
    """ViT images in token order."""
    latents: list[LatentImage] = field(default_factory=list)
    """Latent images in token order."""
    kind_S: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    """TEXT, VIT or LATENT."""
    position_S: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """RoPE ids."""
    ce_S: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """Rows with cross-entropy, whose next token is a target."""

    @property
    def tokens(self) -> int:
        """S, the number of tokens."""
        return len(self.kind_S)


def plan_sample(items: list[Item], key: SampleKey, dropout: Dropout, advance_dropped: bool = True) -> SamplePlan:
    """Apply conditioning dropout to the items of a sample and lay out the rest.

    Args:
        items: the sample, as sizes.
        key: labels of the sample's random draws.
        dropout: probabilities; each droppable item has a keyed draw of its own.
        advance_dropped: see `lay_out`.
    """
    return lay_out(items, key, dropped_items(items, key, dropout), advance_dropped)


def dropped_items(items: list[Item], key: SampleKey, dropout: Dropout) -> set[int]:
    """Return the indices of the items that conditioning dropout leaves out (docs/bagel.md#conditioning-dropout)."""
    return {
        index
        for index, item in enumerate(items)
        if (probability := dropout.of(item)) > 0 and key.uniform("drop", index) < probability
    }


def lay_out(items: list[Item], key: SampleKey, dropped: Collection[int], advance_dropped: bool = True) -> SamplePlan:
    """Lay out one sample without its dropped items.

    Args:
        items: the sample, as sizes.
        key: labels of the sample's random draws (timesteps, noise).
        dropped: indices of items to leave out.
        advance_dropped: whether a dropped image still advances the RoPE counter by one, as in the released trainer
            (docs/bagel.md#rope). Dropped text never does.
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
    """Yield (kinds, RoPE ids, loss flags, RoPE counter afterwards) for each text or image of the item."""
    if isinstance(item, Text):
        length = item.length + DELIMITERS
        loss = np.zeros(length, bool)
        # Rows bos to last id predict first id to eos; eos itself predicts nothing.
        loss[: length - 1] = item.loss
        yield np.full(length, TEXT, np.uint8), counter + np.arange(length, dtype=np.int32), loss, counter + length
        return
    frames = item.frames if isinstance(item, Clip) else (item,)
    steps = item.steps if isinstance(item, Clip) else (None,)
    for frame, step in zip(frames, steps, strict=True):
        kind = np.full(item_tokens(frame), VIT if isinstance(frame, Vit) else LATENT, np.uint8)
        kind[[0, -1]] = TEXT
        position = np.full(len(kind), counter, np.int32)
        # A noised image does not advance the counter: the clean copy that follows it takes the same RoPE id.
        if step is None:
            step = int(not (isinstance(frame, Latent) and frame.noised))
        counter += step
        yield kind, position, np.zeros(len(kind), bool), counter


def _register_images(plan: SamplePlan, item: Item, index: int) -> None:
    if isinstance(item, Vit):
        plan.vits.append(item)
    elif isinstance(item, Latent | Clip):
        frames = item.frames if isinstance(item, Clip) else (item,)
        # All frames of a clip share one timestep draw; noise is drawn per frame. Keys use the index among all items,
        # dropped ones included, so dropout of one item does not change the draws of the others.
        raw = float(plan.key.generator("timestep", index).standard_normal())
        for number, frame in enumerate(frames):
            timestep = raw if frame.noised else -np.inf
            seed = plan.key.seed64("noise", index, number)
            plan.latents.append(LatentImage(frame.slot, frame.rows, frame.cols, timestep, seed, frame.constraint_slot))

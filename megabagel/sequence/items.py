"""Items of a sample, as sizes without content (docs/bagel.md#samples).

An item refers to its content by a slot (index of a text or image of the document) and holds its size. Every item
becomes one attention segment (`split` in the released code): a run of tokens under one mode of the mask. The frames of
a clip share one segment.
"""

from dataclasses import dataclass
from enum import IntEnum


class Mode(IntEnum):
    """Attention mode of a segment (BAGEL section 2.3, figure 15; docs/bagel.md#mask).

    CAUSAL: tokens see earlier ones (text). FULL: tokens see the whole segment (ViT and clean images). NOISE: like FULL,
    but invisible to every other segment (noised images).
    """

    CAUSAL = 0
    FULL = 1
    NOISE = 2


@dataclass(frozen=True)
class Text:
    """A text: bos, `length` token ids, eos. With `loss`, every id and eos is a next-token target."""

    slot: int
    length: int
    loss: bool = False
    droppable: bool = False


@dataclass(frozen=True)
class Vit:
    """An image for the ViT: start-of-image, rows x cols patches, end-of-image."""

    slot: int
    rows: int
    cols: int
    droppable: bool = False


@dataclass(frozen=True)
class Latent:
    """A VAE image: start-of-image, rows x cols latent tokens, end-of-image. `noised` ones bear the flow loss."""

    slot: int
    rows: int
    cols: int
    noised: bool
    droppable: bool = False
    constraint_slot: int | None = None
    """Slot of the image whose latents are a second flow target (SRUM equation 2); None: no such target."""


@dataclass(frozen=True)
class Clip:
    """Several latent images (video frames) in one segment: full attention among them, one timestep for all."""

    frames: tuple[Latent, ...]
    steps: tuple[int | None, ...]
    """Per frame, the increment of the RoPE counter after it. None: the rule of a single image, 1 after a clean image
    and 0 after a noised one."""
    chain: int | None = None
    """Number of a diffusion-forcing chain (BAGEL section 2.3), of which a noised clip is one group: it sees the earlier
    groups of its chain at their own noise levels, and only later groups see it. None: no chain."""

    @property
    def noised(self) -> bool:
        """Whether the frames are generated, that is, bear the flow loss."""
        return self.frames[0].noised

    @property
    def mode(self) -> Mode:
        """Attention mode of the shared segment."""
        # Outside of chains this is the released code's rule (docs/bagel.md#samples), kept although it makes a noised
        # clip whose first frame has a step visible to what follows.
        if self.chain is not None or (self.noised and self.steps[0] is None):
            return Mode.NOISE
        return Mode.FULL


Item = Text | Vit | Latent | Clip

DELIMITERS = 2
"""Special tokens around every text and image: one before, one after."""

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
"""Start and end of a text, start and end of an image (docs/bagel.md#special-tokens)."""


def item_tokens(item: Item) -> int:
    """Return the number of tokens that the item adds to the sequence, delimiters included."""
    if isinstance(item, Clip):
        return sum(item_tokens(frame) for frame in item.frames)
    content = item.length if isinstance(item, Text) else item.rows * item.cols
    return content + DELIMITERS

"""Items: what a sample is made of, in order, as sizes (docs/bagel.md#samples).

An item names its content by a slot (which text or image of the document) and says how large it is. Every item becomes
one segment of the attention rule; a clip of several frames shares one.
"""

from dataclasses import dataclass
from enum import IntEnum


class Mode(IntEnum):
    """How the tokens of a segment see each other and are seen (BAGEL section 2.3, figure 15)."""

    CAUSAL = 0
    FULL = 1
    NOISE = 2


@dataclass(frozen=True)
class Text:
    """bos, `length` ids, eos. With `loss`, every id and eos is a next-token target."""

    slot: int
    length: int
    loss: bool = False
    droppable: bool = False


@dataclass(frozen=True)
class Vit:
    """start-of-image, rows x cols ViT patches, end-of-image."""

    slot: int
    rows: int
    cols: int
    droppable: bool = False


@dataclass(frozen=True)
class Latent:
    """start-of-image, rows x cols latent tokens, end-of-image; `noised` ones are generated (flow loss)."""

    slot: int
    rows: int
    cols: int
    noised: bool
    droppable: bool = False


@dataclass(frozen=True)
class Clip:
    """Several latent images in one segment, full attention among them, one timestep for all.

    `steps` holds, per frame, how far the RoPE counter moves after it; None follows the rule of a single image: one
    after a clean image, none after a noised one. With `chain`, a noised clip is a group of diffusion forcing (BAGEL
    section 2.3): it sees the earlier groups of its chain at their own noise levels, and only they see it. Without,
    the released code's rule holds: the segment is `noise` if its first frame is noised and has no step, else `full`.
    """

    frames: tuple[Latent, ...]
    steps: tuple[int | None, ...]
    chain: int | None = None

    @property
    def noised(self) -> bool:
        """Whether the frames are generated."""
        return self.frames[0].noised

    @property
    def mode(self) -> Mode:
        """Attention mode of the shared segment."""
        if self.chain is not None or (self.noised and self.steps[0] is None):
            return Mode.NOISE
        return Mode.FULL


Item = Text | Vit | Latent | Clip

DELIMITERS = 2
"""Every text and image is bracketed by two special tokens."""

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
"""Start and end of a text, start and end of an image (docs/bagel.md#special-tokens)."""


def item_tokens(item: Item) -> int:
    """Tokens the item adds to the sequence, delimiters included."""
    if isinstance(item, Clip):
        return sum(item_tokens(frame) for frame in item.frames)
    content = item.length if isinstance(item, Text) else item.rows * item.cols
    return content + DELIMITERS

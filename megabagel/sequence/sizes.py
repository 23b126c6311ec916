"""Counts of tokens, loss rows, visible pairs and images of a sample or pack, without laying it out.

The global data plan and the FLOP count work on these. `sample_size` counts from items, which the plan does for every
sample of a job; `pack_size` counts from the arrays of a pack. Both give the same numbers.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from megabagel.sequence.images import vae_images
from megabagel.sequence.items import DELIMITERS, Clip, Item, Latent, Mode, Text, Vit
from megabagel.sequence.pack import Pack


class Size(NamedTuple):
    """Counts of one sample, or of several (see `total`)."""

    samples: int = 0
    tokens: int = 0
    tokens_gen: int = 0
    """Tokens of the generation expert."""
    ce_tokens: int = 0
    """Rows with cross-entropy."""
    mse_tokens: int = 0
    """Rows with flow loss."""
    visible: int = 0
    """(query, key) pairs that the mask allows."""
    squares: int = 0
    """Sum over samples of tokens squared."""
    patches: int = 0
    """ViT patches."""
    patch_squares: int = 0
    """Sum over ViT images of patches squared: (query, key) pairs of the ViT's attention."""
    encoded: int = 0
    """Latent tokens of the images that the VAE encodes, each image counted once."""
    encoded_squares: int = 0
    """Sum over these images of latent tokens squared."""
    vit_images: int = 0
    """Images that the ViT encodes."""
    vae_images: int = 0
    """Images that the VAE encodes."""


def total(sizes: Iterable[Size]) -> Size:
    """Return the sum of each count."""
    return Size(*map(sum, zip(*sizes, strict=True)))


def sample_size(items: list[Item], dropped: Collection[int]) -> Size:
    """Return the counts of `lay_out(items, key, dropped)`, which do not depend on the key."""
    tokens = gen = ce = mse = visible = public = patches = patch_squares = towers = 0
    images: dict[tuple[int, int, int], int] = {}
    chains: dict[int, int] = {}
    for number, item in enumerate(items):
        if number in dropped:
            continue
        if isinstance(item, Text):
            length = item.length + DELIMITERS
            visible += length * public + length * (length + 1) // 2
            public += length
            ce += (length - 1) * item.loss
        elif isinstance(item, Vit):
            cells = item.rows * item.cols
            length = cells + DELIMITERS
            public += length
            visible += length * public
            patches += cells
            patch_squares += cells**2
            towers += 1
        else:
            frames = item.frames if isinstance(item, Clip) else (item,)
            length = 0
            for frame in frames:
                cells = frame.rows * frame.cols
                length += cells + DELIMITERS
                gen += cells
                mse += cells * frame.noised
                slots = (frame.slot,) if frame.constraint_slot is None else (frame.slot, frame.constraint_slot)
                images |= {(slot, frame.rows, frame.cols): cells for slot in slots}
            seen = _private(item, length, chains)
            public += 0 if seen else length
            visible += length * (public + seen)
        tokens += length
    return Size(
        samples=1,
        tokens=tokens,
        tokens_gen=gen,
        ce_tokens=ce,
        mse_tokens=mse,
        visible=visible,
        squares=tokens**2,
        patches=patches,
        patch_squares=patch_squares,
        encoded=sum(images.values()),
        encoded_squares=sum(cells**2 for cells in images.values()),
        vit_images=towers,
        vae_images=len(images),
    )


def _private(item: Latent | Clip, length: int, chains: dict[int, int]) -> int:
    """Return how many private keys each query of a segment sees: its own and earlier ones of its chain; 0 if public.

    Adds the segment to the running total of its chain in `chains`.
    """
    if isinstance(item, Latent):
        return length if item.noised else 0
    if item.mode is not Mode.NOISE:
        return 0
    if item.chain is None:
        return length
    chains[item.chain] = chains.get(item.chain, 0) + length
    return chains[item.chain]


def pack_size(pack: Pack) -> Size:
    """Return the counts of a pack."""
    lengths = np.array([sample.tokens for sample in pack.samples], np.int64)
    towers = np.array([vit.rows * vit.cols for sample in pack.samples for vit in sample.vits], np.int64)
    encoded = np.array([image.tokens for image in vae_images(pack)], np.int64)
    return Size(
        samples=len(pack.samples),
        tokens=pack.tokens,
        tokens_gen=pack.tokens_gen,
        ce_tokens=pack.ce_tokens,
        mse_tokens=pack.mse_tokens,
        visible=int(pack.visible_S.sum()),
        squares=int((lengths**2).sum()),
        patches=int(towers.sum()),
        patch_squares=int((towers**2).sum()),
        encoded=int(encoded.sum()),
        encoded_squares=int((encoded**2).sum()),
        vit_images=len(towers),
        vae_images=len(encoded),
    )

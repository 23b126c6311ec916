"""Which rank encodes which image: ViT images over context-parallel ranks, VAE images over all ranks of a stage.

An image is encoded once per pack, however often its latents appear (noised, then clean).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megabagel.sequence.items import Vit
from megabagel.sequence.pack import Pack
from megabagel.sequence.packing import deal


@dataclass(frozen=True)
class VaeImage:
    """An image whose latents a pack needs: sample of the pack, slot of its document, token grid."""

    sample: int
    slot: int
    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        """Latent tokens."""
        return self.rows * self.cols


def vit_images(pack: Pack) -> list[tuple[int, Vit]]:
    """(sample, image) in token order."""
    return [(number, image) for number, sample in enumerate(pack.samples) for image in sample.vits]


def vae_images(pack: Pack) -> list[VaeImage]:
    """Distinct images behind the pack's latents, in order of first use."""
    uses = (
        VaeImage(number, image.slot, image.rows, image.cols)
        for number, sample in enumerate(pack.samples)
        for image in sample.latents
    )
    return list(dict.fromkeys(uses))


@dataclass(frozen=True)
class ImageShares:
    """Which rank encodes which images, balanced by tokens, and where the tokens lie once all shares are gathered.

    Every rank contributes the same number of rows to the gather: its own images end to end, then padding.
    """

    sizes: tuple[int, ...]
    """Tokens of every image."""
    dealt: tuple[tuple[int, ...], ...]
    """Image numbers of each rank; a rank may have none."""

    @classmethod
    def of(cls, sizes: Sequence[int], ranks: int) -> "ImageShares":
        """Deal images of `sizes` tokens to `ranks` ranks."""
        parts = deal(list(sizes), ranks, capacity=len(sizes))
        return cls(tuple(sizes), tuple(map(tuple, parts)))

    @property
    def rows(self) -> int:
        """Rows of every rank: the largest share. At least one, which keeps the ViT tower in the graph of a pack that
        has no image."""
        return max(1, *(sum(self.sizes[i] for i in part) for part in self.dealt))

    def tokens(self, rank: int) -> np.ndarray:
        """Token numbers (int64; images end to end in their own order) on the first rows of a rank."""
        start = np.cumsum([0, *self.sizes])
        parts = (np.arange(start[i], start[i + 1]) for i in self.dealt[rank])
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def gathered_row(self) -> np.ndarray:
        """For every token, its row (int64) among all ranks' rows laid end to end."""
        row = np.empty(sum(self.sizes), np.int64)
        for rank in range(len(self.dealt)):
            own = self.tokens(rank)
            row[own] = rank * self.rows + np.arange(len(own))
        return row


def vit_shares(pack: Pack, cp: int) -> ImageShares:
    """ViT images (see `vit_images`) over context-parallel ranks; tensor-parallel ranks work on the same ones."""
    return ImageShares.of([image.rows * image.cols for _, image in vit_images(pack)], cp)


def vae_shares(pack: Pack, ranks: int) -> ImageShares:
    """Images to encode (see `vae_images`) over all `ranks` of a pipeline stage that share the pack."""
    return ImageShares.of([image.tokens for image in vae_images(pack)], ranks)


@dataclass(frozen=True)
class LatentIndex:
    """Per latent token (L, token order) its image among `pack.latents` and its place in it; per image (I) its x_0.

    place_L: row-major number inside the image. start_I: row of the image's first token among the tokens of
    `vae_images`, laid end to end. All int64.
    """

    image_L: np.ndarray
    place_L: np.ndarray
    start_I: np.ndarray


def index_latents(pack: Pack) -> LatentIndex:
    """Index the latent tokens of a pack."""
    starts, total = {}, 0
    for image in vae_images(pack):
        starts[image.sample, image.slot] = total
        total += image.tokens
    uses = [(number, image) for number, sample in enumerate(pack.samples) for image in sample.latents]
    sizes = [image.rows * image.cols for _, image in uses]
    return LatentIndex(
        image_L=np.repeat(np.arange(len(uses)), sizes),
        place_L=np.concatenate([np.zeros(0, np.int64), *map(np.arange, sizes)]),
        start_I=np.array([starts[number, image.slot] for number, image in uses], np.int64),
    )

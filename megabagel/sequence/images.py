"""Distribution of image encoding: ViT images over context-parallel ranks, VAE images over all ranks of a stage.

The VAE encodes an image once per pack, however often its latents occur (noised, then clean).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megabagel.sequence.items import Vit
from megabagel.sequence.pack import Pack
from megabagel.sequence.packing import deal


@dataclass(frozen=True)
class VaeImage:
    """An image to encode with the VAE: its sample in the pack, its slot in the document, its token grid."""

    sample: int
    slot: int
    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        """Number of latent tokens."""
        return self.rows * self.cols


def vit_images(pack: Pack) -> list[tuple[int, Vit]]:
    """Return (sample number, image) for every ViT image of the pack, in token order."""
    return [(number, image) for number, sample in enumerate(pack.samples) for image in sample.vits]


def vae_images(pack: Pack) -> list[VaeImage]:
    """Return the distinct images behind the pack's latent tokens and second targets, in order of first use."""
    uses = (
        VaeImage(number, slot, image.rows, image.cols)
        for number, sample in enumerate(pack.samples)
        for image in sample.latents
        for slot in (image.slot, image.constraint_slot)
        if slot is not None
    )
    # A dict keeps the order of first insertion; a set would not, and all ranks must agree on the numbering.
    return list(dict.fromkeys(uses))


@dataclass(frozen=True)
class ImageShares:
    """Assignment of images to ranks, balanced by tokens, and the position of each token after the all-gather.

    Every rank contributes the same number of rows to the all-gather: its own images end to end, then padding.
    """

    sizes: tuple[int, ...]
    """Tokens of every image."""
    dealt: tuple[tuple[int, ...], ...]
    """Image numbers of each rank; a rank may have none."""

    @classmethod
    def of(cls, sizes: Sequence[int], ranks: int) -> "ImageShares":
        """Assign images of `sizes` tokens to `ranks` ranks, largest first to the least loaded rank."""
        # Shares are balanced by tokens, not by number of images: a rank may take all of them.
        parts = deal(list(sizes), ranks, capacity=len(sizes))
        return cls(tuple(sizes), tuple(map(tuple, parts)))

    @property
    def rows(self) -> int:
        """Rows that every rank contributes to the all-gather: the largest share, at least one."""
        # One padding row keeps the ViT in the autograd graph of a pack without images, so that its gradients exist and
        # every rank takes part in their reduction.
        return max(1, *(sum(self.sizes[i] for i in part) for part in self.dealt))

    def tokens(self, rank: int) -> np.ndarray:
        """Return the token numbers (int64) that a rank's rows hold before its padding.

        Tokens are numbered over all images laid end to end in their original order.
        """
        start = np.cumsum([0, *self.sizes])
        parts = (np.arange(start[i], start[i + 1]) for i in self.dealt[rank])
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def gathered_row(self) -> np.ndarray:
        """Return for every token its row (int64) in the all-gathered tensor, all ranks' rows end to end."""
        row = np.empty(sum(self.sizes), np.int64)
        for rank in range(len(self.dealt)):
            own = self.tokens(rank)
            row[own] = rank * self.rows + np.arange(len(own))
        return row


def vit_shares(pack: Pack, cp: int) -> ImageShares:
    """Assign ViT images (see `vit_images`) to context-parallel ranks.

    Tensor-parallel ranks encode the same images together: the tower itself is split over them.
    """
    return ImageShares.of([image.rows * image.cols for _, image in vit_images(pack)], cp)


def vae_shares(pack: Pack, ranks: int) -> ImageShares:
    """Assign VAE images (see `vae_images`) to all `ranks` (tp x cp) of a pipeline stage that share the pack."""
    return ImageShares.of([image.tokens for image in vae_images(pack)], ranks)


@dataclass(frozen=True)
class LatentIndex:
    """Index from the latent tokens of a pack to their images and encoded latents. All arrays are int64."""

    image_L: np.ndarray
    """[L] index of the token's image in `pack.latents`."""
    place_L: np.ndarray
    """[L] row-major number of the token inside its image."""
    start_I: np.ndarray
    """[I] number of the image's first token among the tokens of `vae_images`, laid end to end. Two uses of one image
    (noised, clean) have the same start."""
    constraint_start_I: np.ndarray
    """[I] the same for the image of the second target; that of the image itself where there is none."""


def index_latents(pack: Pack) -> LatentIndex:
    """Build the index of a pack's latent tokens, in token order."""
    starts, total = {}, 0
    for image in vae_images(pack):
        starts[image.sample, image.slot] = total
        total += image.tokens
    uses = [(number, image) for number, sample in enumerate(pack.samples) for image in sample.latents]
    sizes = [image.rows * image.cols for _, image in uses]
    seconds = [image.slot if image.constraint_slot is None else image.constraint_slot for _, image in uses]
    return LatentIndex(
        image_L=np.repeat(np.arange(len(uses)), sizes),
        place_L=np.concatenate([np.zeros(0, np.int64), *map(np.arange, sizes)]),
        start_I=np.array([starts[number, image.slot] for number, image in uses], np.int64),
        constraint_start_I=np.array(
            [starts[number, slot] for (number, _), slot in zip(uses, seconds, strict=True)], np.int64
        ),
    )

"""Which rank encodes which image: ViT images over context-parallel ranks, VAE images over all ranks of a stage.

An image is encoded once per pack, however often its latents appear (noised, then clean).
"""

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


def shares(costs: list[int], ranks: int) -> list[list[int]]:
    """Image numbers per rank, balanced by cost; a rank may get none."""
    return deal(costs, ranks, capacity=len(costs))


@dataclass(frozen=True)
class LatentIndex:
    """Per latent token (L, token order): its image among `pack.latents`, its place in it, and where its x_0 lies.

    place_L: row-major number inside the image. x0_L: row among the tokens of `vae_images`, laid end to end.
    """

    image_L: np.ndarray
    place_L: np.ndarray
    x0_L: np.ndarray


def index_latents(pack: Pack) -> LatentIndex:
    """Index the latent tokens of a pack."""
    starts, total = {}, 0
    for image in vae_images(pack):
        starts[image.sample, image.slot] = total
        total += image.tokens
    uses = [(number, image) for number, sample in enumerate(pack.samples) for image in sample.latents]
    sizes = [image.rows * image.cols for _, image in uses]
    image_L = np.repeat(np.arange(len(uses)), sizes)
    place_L = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.zeros(0, np.int64)
    first_L = np.repeat(np.array([starts[number, image.slot] for number, image in uses], np.int64), sizes)
    return LatentIndex(image_L, place_L, first_L + place_L)

"""The packed batch: one micro-batch as the data side hands it to the model side."""

from dataclasses import dataclass
from typing import Any

import torch

from megabagel.sequence.images import shares, vae_images, vit_images
from megabagel.sequence.layout import Layout
from megabagel.sequence.pack import Pack


@dataclass(frozen=True)
class AttentionPlans:
    """What this run's attention engine needs for the masks of a batch, on the CPU (see `parallel.plans`)."""

    layers: Any
    vit: Any
    """None on ranks without the ViT tower."""


@dataclass(frozen=True)
class PackedBatch:
    """A pack with its layout and the content that this rank needs.

    Plan and layout are equal on all ranks of a model-parallel group; content differs by what the rank encodes.
    """

    pack: Pack
    layout: Layout
    words: torch.Tensor
    """int64 [words]: word id of every TEXT token, in token order."""
    patches: list[torch.Tensor]
    """fp32 [n, patch * patch * 3] in [-1, 1] per ViT image that this rank encodes."""
    pixels: list[torch.Tensor]
    """fp32 [3, height, width] in [-1, 1] per image whose latents this rank encodes."""
    moments: list[torch.Tensor] | None = None
    """From a latent cache, instead of pixels: fp32 [M, h, w] of the codec (see `model.vae.Codec`) per such image."""
    plans: AttentionPlans | None = None
    """None: who builds the inputs makes them."""


@dataclass(frozen=True)
class Encoders:
    """How a pack's images are dealt: this rank's index among those that share the ViT work, and the VAE work.

    Ranks outside the first pipeline stage encode nothing.
    """

    active: bool
    cp_rank: int
    cp_size: int
    stage_rank: int
    stage_size: int

    def vit(self, pack: Pack) -> list[int]:
        """Numbers among `vit_images` that this rank encodes."""
        costs = [image.rows * image.cols for _, image in vit_images(pack)]
        return shares(costs, self.cp_size)[self.cp_rank] if self.active else []

    def vae(self, pack: Pack) -> list[int]:
        """Numbers among `vae_images` that this rank encodes."""
        costs = [image.tokens for image in vae_images(pack)]
        return shares(costs, self.stage_size)[self.stage_rank] if self.active else []

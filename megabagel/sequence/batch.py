"""The packed batch: one micro-batch as the data side hands it to the model side, and how it is made.

Every batch is made here: by the loader's workers, by the sampler for its prompts, by parity for its cases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megabagel_kernels.attention.mask import AttentionRanges

from megabagel.config.schema import Config
from megabagel.sequence.items import Mode
from megabagel.sequence.layout import Layout
from megabagel.sequence.one_buffer import Span, gather_arrays, map_fields
from megabagel.sequence.pack import Pack, mask_codes
from megabagel.sequence.rank_rows import RankPack, RankPlace, RankRows, derive_rows
from megabagel.sequence.sample import Segment

if TYPE_CHECKING:  # loads the engines, which the data side does not need
    from megabagel_kernels.attention.engines import AttentionPlan


@dataclass(frozen=True)
class AttentionPlans:
    """Plans of this run's attention engine for the masks of a batch, on the CPU."""

    layers: "AttentionPlan"
    vit: "AttentionPlan | None"
    """None on ranks without the ViT tower."""


@dataclass(frozen=True)
class PackedRows:
    """`RankRows` in one buffer of bytes."""

    buffer: torch.Tensor
    """uint8, on the CPU."""
    spans: RankRows[Span]

    @classmethod
    def of(cls, rows: RankRows[np.ndarray]) -> "PackedRows":
        """Copy the arrays of `rows` into one buffer."""
        return cls(*gather_arrays(rows))

    def arrays(self) -> RankRows[np.ndarray]:
        """The rows as NumPy views of the buffer."""
        return map_fields(self.spans, Span, lambda span: span.view(self.buffer).numpy())

    def to(self, device: torch.device) -> RankRows[torch.Tensor]:
        """The rows on a device: views of one copy of the buffer, or of the buffer itself on a CPU.

        To a GPU the copy goes through pinned memory, so that it is one transfer that runs beside the kernels queued
        before it; torch keeps the pinned block until the transfer is over.
        """
        on_device = self.buffer
        if device.type != "cpu":
            on_device = self.buffer.pin_memory().to(device, non_blocking=True)
        return map_fields(self.spans, Span, lambda span: span.view(on_device))


@dataclass(frozen=True)
class PackedBatch:
    """A pack with its layout and the content that this rank needs.

    Pack and layout are equal on all ranks of a model-parallel group; the rest is this rank's.
    """

    pack: Pack
    layout: Layout
    rows: PackedRows
    """What the rank's rows hold: token ids, positions, labels, places of images."""
    plans: AttentionPlans
    patches: torch.Tensor | None
    """fp32 [P, patch * patch * 3] in [-1, 1]: the ViT images that this rank encodes, end to end, then zeros as padding.
    None on ranks without the ViT tower."""
    pixels: list[torch.Tensor]
    """fp32 [3, height, width] in [-1, 1] per image whose latents this rank encodes."""
    moments: list[torch.Tensor] | None = None
    """From a latent cache, instead of pixels: fp32 [C, h, w] of the codec (see `model.vae.Codec`) per such image."""


@dataclass(frozen=True)
class BatchBuilder:
    """Makes the batches of one rank. Plain data: a loader's worker holds a copy.

    place: the rank's place in the grid of `config`. plan_attention: `AttentionEngine.plan`, (mask, head dimension) ->
    plan, once per batch and away from the training step.
    """

    config: Config
    place: RankPlace
    plan_attention: Callable[[AttentionRanges, int], Any]

    def lay_out(self, pack: Pack) -> RankPack:
        """The pack as this rank holds it, with the images that it has to encode."""
        return RankPack.of(pack, self.config, self.place)

    def build(
        self,
        rank: RankPack,
        token_ids: np.ndarray,
        patches: list[torch.Tensor],
        pixels: list[torch.Tensor],
        moments: list[torch.Tensor] | None = None,
        latent_weight_L: np.ndarray | None = None,
    ) -> PackedBatch:
        """A batch with its content.

        Args:
            rank: the pack, from `lay_out`.
            token_ids: int64, of every text token of the pack in token order.
            patches: fp32 [n, patch * patch * 3] in [-1, 1] for each of `rank.vit_images`.
            pixels: see `PackedBatch`, of `rank.vae_images`; empty with `moments` or where latents come from outside.
            moments: see `PackedBatch`, of `rank.vae_images`.
            latent_weight_L: [L] weight of each latent token in the flow loss; None: 1 for each.
        """
        rows = PackedRows.of(derive_rows(rank, self.config, token_ids, latent_weight_L))
        padded = None
        if rows.spans.vit is not None:  # in one piece already here, not in the training process
            padding = rank.vit.rows - sum(map(len, patches))
            padded = torch.cat([*patches, torch.zeros(padding, 3 * self.config.model.vit.patch**2)])
        return PackedBatch(rank.pack, rank.layout, rows, self._plans(rank), padded, pixels, moments)

    def _plans(self, rank: RankPack) -> AttentionPlans:
        model, cp = self.config.model, self.place.cp
        layers = self.plan_attention(rank.layout.codes(rank.pack, cp), model.kv_channels)
        if not (self.place.first and model.visual_und):
            return AttentionPlans(layers, None)
        return AttentionPlans(layers, self.plan_attention(_vit_codes(rank), model.vit.head_dim))


def _vit_codes(rank: RankPack) -> AttentionRanges:
    """Full attention inside each ViT image of this rank; padding sees nothing."""
    sizes = [rank.vit.sizes[i] for i in rank.vit.dealt[rank.place.cp]]
    codes = mask_codes([[Segment(Mode.FULL, size)] for size in sizes])
    return codes.padded(rank.vit.rows - sum(sizes))

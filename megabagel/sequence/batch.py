"""The packed batch: one micro-batch as the data loader hands it to the model, and its builder.

Loader workers, the sampler (for prompts) and the parity command (for golden cases) all build their batches here, so
that each of them feeds the model the same layout.
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
from megabagel.sequence.rank_rows import LatentWeights, RankPack, RankPlace, RankRows, derive_rows
from megabagel.sequence.sample import Segment

# Importing the engines at run time would load every attention backend in loader workers, which only need the type.
if TYPE_CHECKING:
    from megabagel_kernels.attention.engines import AttentionPlan


@dataclass(frozen=True)
class AttentionPlans:
    """Block schedules that the run's attention engine made for the masks of one batch, still in CPU memory."""

    layers: "AttentionPlan"
    """Of the decoder layers: queries of this rank, keys of all context-parallel ranks."""
    vit: "AttentionPlan | None"
    """Of the ViT: full attention inside each image. None on ranks without the ViT tower."""


@dataclass(frozen=True)
class PackedRows:
    """The arrays of a `RankRows` packed into one byte buffer, so that they are sent and copied as one tensor."""

    buffer: torch.Tensor
    """uint8, in CPU memory."""
    spans: RankRows[Span]
    """The same record with each array replaced by its place in `buffer`."""

    @classmethod
    def of(cls, rows: RankRows[np.ndarray]) -> "PackedRows":
        """Copy the arrays of `rows` into one buffer."""
        return cls(*gather_arrays(rows))

    def arrays(self) -> RankRows[np.ndarray]:
        """Return the rows as NumPy views of the buffer, without a copy."""
        return map_fields(self.spans, Span, lambda span: span.view(self.buffer).numpy())

    def to(self, device: torch.device) -> RankRows[torch.Tensor]:
        """Return the rows on `device`: views of one copy of the buffer, or of the buffer itself on a CPU."""
        on_device = self.buffer
        # Pinned memory lets the transfer overlap kernels that were queued before it. The pinned tensor may go out of
        # scope here: torch's caching host allocator keeps its block until the transfer has ended.
        if device.type != "cpu":
            on_device = self.buffer.pin_memory().to(device, non_blocking=True)
        return map_fields(self.spans, Span, lambda span: span.view(on_device))


@dataclass(frozen=True)
class PackedBatch:
    """A pack, its layout and the content that this rank needs.

    `pack` and `layout` are equal on all ranks of a model-parallel group; the other fields belong to this rank.
    """

    pack: Pack
    layout: Layout
    rows: PackedRows
    """Token ids, positions, labels and image indices of this rank's rows."""
    plans: AttentionPlans
    patches: torch.Tensor | None
    """fp32 [P, patch * patch * 3] in [-1, 1]: the ViT images that this rank encodes, end to end, then zero padding.
    None on ranks without the ViT tower."""
    pixels: list[torch.Tensor]
    """fp32 [3, height, width] in [-1, 1] for each image that this rank encodes with the VAE."""
    moments: list[torch.Tensor] | None = None
    """Replaces `pixels` where a latent cache is used: fp32 [C, h, w] codec moments (`model.vae.Codec`) per image."""


@dataclass(frozen=True)
class BatchBuilder:
    """Builds the batches of one rank. Picklable: each loader worker holds a copy."""

    config: Config
    place: RankPlace
    """Indices of the rank in the grid of `config`."""
    plan_attention: Callable[[AttentionRanges, int], Any]
    """`AttentionEngine.plan`: (mask, head dim) -> plan. Called once per batch in the worker, because the schedule costs
    milliseconds of CPU time (docs/kernels.md#attention) that the training step would wait for."""

    def lay_out(self, pack: Pack) -> RankPack:
        """Lay `pack` out for this rank and select the images that the rank encodes."""
        return RankPack.of(pack, self.config, self.place)

    def build(
        self,
        rank: RankPack,
        token_ids: np.ndarray,
        patches: list[torch.Tensor],
        pixels: list[torch.Tensor],
        moments: list[torch.Tensor] | None = None,
        latent_weights: LatentWeights | None = None,
    ) -> PackedBatch:
        """Build the batch of a pack from its decoded content.

        Args:
            rank: the pack, from `lay_out`.
            token_ids: int64 ids of every text token of the pack in token order, delimiters included.
            patches: fp32 [n, patch * patch * 3] in [-1, 1] for each of `rank.vit_images`.
            pixels: see `PackedBatch`, for each of `rank.vae_images`; empty if `moments` is given, or if the caller
                passes latents to the model itself.
            moments: see `PackedBatch`, for each of `rank.vae_images`.
            latent_weights: weights of the latent tokens in the flow loss; None: 1 for each.
        """
        rows = PackedRows.of(derive_rows(rank, self.config, token_ids, latent_weights))
        padded = None
        # Concatenated here, in the worker, so that the training process neither copies nor pads pixels.
        if rows.spans.vit is not None:
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
    """Attention ranges of the ViT on this rank: full attention inside each image; padding rows see nothing."""
    sizes = [rank.vit.sizes[i] for i in rank.vit.dealt[rank.place.cp]]
    codes = mask_codes([[Segment(Mode.FULL, size)] for size in sizes])
    return codes.padded(rank.vit.rows - sum(sizes))

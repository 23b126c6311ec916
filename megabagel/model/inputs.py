"""Input and output records of the model for one micro-batch, built from a packed batch by `parallel.inputs`.

Shape letters: docs/notation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q [T, N, H], k [T, M, H], v [T, M, H]) -> [T, N, H] under the mask of the batch."""

LayerAttend = Callable[[int], Attend]
"""Index of a layer in the whole model -> its attention function. In training the same function for all layers; with a
KV cache each layer has keys and values of its own."""


@dataclass(frozen=True)
class Rope:
    """Rotary cos and sin of the [und | gen] rows: fp32 [T, H] each."""

    cos_TH: torch.Tensor
    sin_TH: torch.Tensor


@dataclass(frozen=True)
class VitInputs:
    """Images for the ViT."""

    patches: torch.Tensor
    """[P, patch * patch * 3] in [-1, 1]; a patch is ordered row, column, channel."""
    grid: torch.Tensor
    """[P] int64 ids in the ViT's learned position table, for the patches that this rank encodes."""
    grid_all: torch.Tensor
    """[P] int64 ids in the frozen position table, for all patches of the pack in token order."""
    row_U: torch.Tensor
    """[U] int64: index of the pack's patch that a row takes; -1 for text and padding."""
    attend: Attend
    """Full attention inside each image."""
    collect: Callable[[torch.Tensor], torch.Tensor]
    """All-gather over context-parallel ranks: [P, D] of this rank -> [P, D] of the whole pack in token order."""


@dataclass(frozen=True)
class LatentInputs:
    """Latent tokens, already noised."""

    x_t_gZ: torch.Tensor
    """[g, Z] fp32; zeros in padding."""
    target_gZ: torch.Tensor
    """[g, Z] fp32: the velocity eps - x_0 (docs/bagel.md#flow-time)."""
    weight_g: torch.Tensor
    """[g] fp32 weight in the flow loss: 0 for clean images and padding, else 1 or the weight that the batch gives."""
    constraint: "Constraint | None" = field(default=None, kw_only=True)
    """Second flow target; None where no image of the batch has one."""
    grid_g: torch.Tensor
    """[g] int64 ids in the frozen position table; 0 in padding."""
    time_I: torch.Tensor
    """[I] fp32 timesteps in [0, 1], at least one entry."""
    image_g: torch.Tensor
    """[g] int64 index into `time_I` of the row's image; 0 in padding."""


@dataclass(frozen=True)
class Constraint:
    """Second flow target of gen rows and its weights: L_ref of SRUM's equation 2 where good and bad picture differ."""

    target_gZ: torch.Tensor
    """[g, Z] fp32: eps - x_0' of the other image, with the noise of the first."""
    weight_g: torch.Tensor
    """[g] fp32, 0 where the row has no second target."""


@dataclass(frozen=True)
class StageInputs:
    """One micro-batch for one pipeline stage.

    All stages read `attend` and `rope`; the first also `word_U`, `is_word_U`, `vit` and `latents`; the last also the
    fields from `ce_row_Q` on.
    """

    attend: LayerAttend
    rope: Rope
    word_U: torch.Tensor
    """[U] int64 token ids; 0 where the row is not text."""
    is_word_U: torch.Tensor
    """[U] bool: whether the row is a text token."""
    vit: VitInputs | None
    latents: LatentInputs | None
    ce_row_Q: torch.Tensor
    """[Q] int64 indices (in U) of rows with cross-entropy."""
    label_Q: torch.Tensor
    """[Q] int64 next-token labels of these rows."""
    source_Q: torch.Tensor
    """[Q] int64 data source of these rows, for the losses by source in the metrics."""
    source_g: torch.Tensor
    """[g] int64, the same for gen rows."""


@dataclass(frozen=True)
class Hidden:
    """Hidden states of this rank's rows of both experts, with the flow target and its weights.

    Flow targets are made on the first stage, which encodes the images, and are needed on the last one.
    """

    und_uD: torch.Tensor
    gen_gD: torch.Tensor
    target_gZ: torch.Tensor
    weight_g: torch.Tensor
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Outputs:
    """Losses per row and predicted velocities of one micro-batch, from the last stage."""

    ce_Q: torch.Tensor
    """[Q] fp32 cross-entropy, equal on all tensor-parallel ranks."""
    mse_g: torch.Tensor
    """[g] fp32 squared velocity error of this rank's gen rows, averaged over Z and multiplied by the weight, with
    that of the second target where there is one."""
    velocity_gZ: torch.Tensor
    """[g, Z] predicted velocity."""


@dataclass(frozen=True)
class Predictions:
    """Output of the heads in inference: logits and velocities, no losses."""

    logits_QV: torch.Tensor
    """[Q, V] fp32 next-token logits of the requested rows, equal on all tensor-parallel ranks."""
    velocity_gZ: torch.Tensor
    """[g, Z] predicted velocity of this rank's gen rows."""

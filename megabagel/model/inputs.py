"""What one stage of the model needs for one micro-batch, as tensors (built by `parallel.inputs` from a pack).

Shape letters: docs/notation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q [T, N, H], k [T, M, H], v [T, M, H]) -> [T, N, H] under the mask of the batch."""

LayerAttend = Callable[[int], Attend]
"""Number of a layer in the whole model -> its attention. The same for all layers in training; behind a KV cache each
layer has keys and values of its own."""


@dataclass(frozen=True)
class Rope:
    """Rotary tables for [und | gen] rows: cos and sin [U + G, H], fp32."""

    cos_TH: torch.Tensor
    sin_TH: torch.Tensor


@dataclass(frozen=True)
class VitInputs:
    """Images for the ViT tower."""

    patches: torch.Tensor
    """[P, patch * patch * 3] in [-1, 1]; a patch is ordered row, column, channel."""
    grid: torch.Tensor
    """[P] int64 ids of the learned position table, for the patches that this rank encodes."""
    grid_all: torch.Tensor
    """[P] int64, the same for the whole pack in token order."""
    row_U: torch.Tensor
    """[U] int64: which of the pack's encoded patches a row takes, -1 for words and padding."""
    attend: Attend
    """Full attention inside each image."""
    collect: Callable[[torch.Tensor], torch.Tensor]
    """[P, width] of every context-parallel rank -> [P, width] of the whole pack in token order."""


@dataclass(frozen=True)
class LatentInputs:
    """Latent tokens, already noised."""

    x_t_gZ: torch.Tensor
    """[g, Z] fp32; zeros in padding."""
    target_gZ: torch.Tensor
    """[g, Z] fp32: the velocity eps - x_0 (docs/bagel.md#flow-time)."""
    weight_g: torch.Tensor
    """[g] fp32: 1 for rows with flow loss, else 0."""
    grid_g: torch.Tensor
    """[g] int64 ids of the frozen 2-D table; 0 in padding."""
    time_I: torch.Tensor
    """[I] fp32 timesteps in [0, 1], at least one."""
    image_g: torch.Tensor
    """[g] int64: which image's timestep a row has; 0 in padding."""


@dataclass(frozen=True)
class StageInputs:
    """One micro-batch for one stage. `word_U`, `vit`, `latents` serve the first stage, the rest below them the last."""

    attend: LayerAttend
    rope: Rope
    word_U: torch.Tensor
    """[U] int64 word ids; 0 where the row is no word."""
    is_word_U: torch.Tensor
    """[U] bool."""
    vit: VitInputs | None
    latents: LatentInputs | None
    ce_row_Q: torch.Tensor
    """[Q] int64, rows of U with cross-entropy."""
    label_Q: torch.Tensor
    """[Q] int64, the next word of each."""
    source_Q: torch.Tensor
    """[Q] int64, number of the data source behind each of these rows; only for the log."""
    source_g: torch.Tensor
    """[g] int64, the same for gen rows; only for the log."""


@dataclass(frozen=True)
class Hidden:
    """What flows between layers: this rank's rows of both experts, and the flow target on its way to the last stage."""

    und_uD: torch.Tensor
    gen_gD: torch.Tensor
    target_gZ: torch.Tensor
    weight_g: torch.Tensor


@dataclass(frozen=True)
class Outputs:
    """What the last stage says of a micro-batch."""

    ce_Q: torch.Tensor
    """[Q] fp32 cross-entropy, equal on all tensor-parallel ranks."""
    mse_g: torch.Tensor
    """[g] fp32 mean squared velocity error times weight, of this rank's gen rows."""
    velocity_gZ: torch.Tensor
    """[g, Z] predicted velocity."""


@dataclass(frozen=True)
class Predictions:
    """Output of the heads without losses, for inference."""

    logits_QV: torch.Tensor
    """[Q, V] fp32 next-token logits of the rows asked for, equal on all tensor-parallel ranks."""
    velocity_gZ: torch.Tensor
    """[g, C] predicted velocity of this rank's gen rows."""

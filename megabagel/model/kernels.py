"""The operations between the linears, by implementation: plain torch, or Triton kernels for a GPU.

One choice for a run, carried by the layer factory; the model calls what it finds there. All implementations agree up to
rounding, and round bf16 in the same places. The Triton ones take both experts' rows in one call where they lie in one
tensor, and each expert's by itself where they do not.

Shape letters: docs/notation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from megabagel_kernels import pointwise
from megabagel_kernels.flow import LatentImages, NoisedRows, flow_loss_to_target, noised_rows
from megabagel_kernels.linear_cross_entropy import VocabShard, linear_cross_entropy
from torch import Tensor

from megabagel.model.inputs import Rope
from megabagel.model.positions import apply_rope


class QkNormRope(Protocol):
    """Heads' norms with the gamma of each row's expert (none without QK-norm), then the rotary embedding."""

    def __call__(
        self, und_UNH: Tensor, gen_GNH: Tensor, und_H: Tensor | None, gen_H: Tensor | None, eps: float, rope: Rope
    ) -> Tensor:
        """[U, N, H] and [G, N, H], gammas [H] -> [T, N, H]."""


class WordLoss(Protocol):
    """Cross-entropy per row of linear logits that never stand in memory all at once."""

    def __call__(self, hidden_QD: Tensor, weight_VD: Tensor, label_Q: Tensor, /, *, shard: VocabShard) -> Tensor:
        """[Q, D], this rank's words [V, D], labels [Q] -> fp32 [Q]; see `linear_cross_entropy`."""


@dataclass(frozen=True)
class Kernels:
    """One implementation of them all."""

    name: str
    norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [T, W], gamma [W], eps) -> RMS norm [T, W]."""
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(residual [T, W], x [T, W], gamma [W], eps) -> (their sum, its RMS norm)."""
    qk_norm_rope: QkNormRope
    swiglu: Callable[[Tensor], Tensor]
    """[T, 2 F], gate first -> [T, F]."""
    swiglu_keeps_input_alone: bool
    """Nothing that recomputation could save."""
    noised_rows: Callable[[LatentImages, Tensor, Tensor], NoisedRows]
    """(images, image of each row [g] or -1, place in it [g]) -> noised latent tokens and their velocities."""
    flow_loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(v [g, Z], velocity [g, Z], weight [g]) -> weighted mean squared error fp32 [g]."""
    word_loss: WordLoss | None
    """None: the head makes all logits and hands them to torch or megatron-core."""


def _add_norm(residual_TW: Tensor, x_TW: Tensor, gamma_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total_TW = residual_TW + x_TW
    return total_TW, pointwise.rms_norm(total_TW, gamma_W, eps)


def _qk_norm_rope(
    und_UNH: Tensor, gen_GNH: Tensor, und_H: Tensor | None, gen_H: Tensor | None, eps: float, rope: Rope
) -> Tensor:
    if und_H is not None and gen_H is not None:
        und_UNH, gen_GNH = pointwise.rms_norm(und_UNH, und_H, eps), pointwise.rms_norm(gen_GNH, gen_H, eps)
    return apply_rope(torch.cat([und_UNH, gen_GNH]), rope.cos_TH, rope.sin_TH)


TORCH = Kernels(
    name="torch",
    norm=pointwise.rms_norm,
    add_norm=_add_norm,
    qk_norm_rope=_qk_norm_rope,
    swiglu=pointwise.swiglu,
    swiglu_keeps_input_alone=False,
    noised_rows=noised_rows,
    flow_loss=flow_loss_to_target,
    word_loss=None,
)
"""For every device and type."""


def triton_kernels() -> Kernels:
    """Kernels for a GPU, or for Triton's interpreter. Imports Triton."""
    from megabagel_kernels import flow_triton, glue_triton_norm, glue_triton_rope, glue_triton_swiglu

    def norm(x_TW: Tensor, gamma_W: Tensor, eps: float) -> Tensor:
        return glue_triton_norm.rms_norm(x_TW, gamma_W, gamma_W, len(x_TW), eps)

    def add_norm(residual_TW: Tensor, x_TW: Tensor, gamma_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return glue_triton_norm.add_rms_norm(x_TW, residual_TW, gamma_W, gamma_W, len(x_TW), eps)

    def qk_norm_rope(
        und_UNH: Tensor, gen_GNH: Tensor, und_H: Tensor | None, gen_H: Tensor | None, eps: float, rope: Rope
    ) -> Tensor:
        if und_H is None or gen_H is None:
            return _qk_norm_rope(und_UNH, gen_GNH, None, None, eps, rope)
        frequencies = rope.cos_TH.shape[1] // 2  # both halves of a table's row hold the same
        cos_TR, sin_TR = rope.cos_TH[:, :frequencies], rope.sin_TH[:, :frequencies]
        row_T = torch.arange(len(cos_TR), dtype=torch.int32, device=cos_TR.device)
        x_TNH = torch.cat([und_UNH, gen_GNH])
        return glue_triton_rope.qk_norm_rope(x_TNH, und_H, gen_H, len(und_UNH), row_T, cos_TR, sin_TR, eps)

    def flow_loss(v_gZ: Tensor, target_gZ: Tensor, weight_g: Tensor) -> Tensor:
        return flow_triton.flow_losses(v_gZ, target_gZ, weight_g.contiguous()).total_G

    return Kernels(
        name="triton",
        norm=norm,
        add_norm=add_norm,
        qk_norm_rope=qk_norm_rope,
        swiglu=glue_triton_swiglu.swiglu,
        swiglu_keeps_input_alone=True,
        noised_rows=flow_triton.noised_rows,
        flow_loss=flow_loss,
        word_loss=partial(linear_cross_entropy, engine="triton"),
    )

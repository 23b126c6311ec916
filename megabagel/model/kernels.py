"""The operations between the linears, by implementation: plain torch, or Triton kernels for a GPU.

One choice for a run, carried by the layer factory; the model calls what it finds there. Both implementations agree up
to rounding, and round bf16 in the same places.

Letters: U und rows, G gen rows, T = U + G; D width of the model, F of an MLP; N heads, H head dim; g this rank's share
of G, Z latent features of a token; Q rows with cross-entropy, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Protocol

from megabagel_kernels import flow
from megabagel_kernels.checks import Engine
from megabagel_kernels.flow import LatentImages, NoisedRows
from megabagel_kernels.linear_cross_entropy import VocabShard, linear_cross_entropy
from megabagel_kernels.qk_norm_rope import qk_norm_rope
from megabagel_kernels.rms_norm import add_rms_norm, rms_norm
from megabagel_kernels.swiglu import swiglu
from torch import Tensor

from megabagel.model.inputs import Rope


class QkNormRope(Protocol):
    """Heads' norms with the gamma of each row's expert (none without QK-norm), then the rotary embedding."""

    def __call__(
        self, und_UNH: Tensor, gen_GNH: Tensor, und_H: Tensor | None, gen_H: Tensor | None, eps: float, rope: Rope
    ) -> Tensor:
        """[U, N, H] and [G, N, H], gammas [H] -> [T, N, H]."""


class TokenLoss(Protocol):
    """Cross-entropy per row of linear logits that are never in memory all at once."""

    def __call__(self, hidden_QD: Tensor, weight_VD: Tensor, label_Q: Tensor, *, shard: VocabShard) -> Tensor:
        """[Q, D], this rank's rows of the head [V, D], labels [Q] -> fp32 [Q]; see `linear_cross_entropy`."""


@dataclass(frozen=True)
class Kernels:
    """One implementation of them all."""

    name: str
    norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [T, D], gamma [D], eps) -> RMSNorm [T, D]."""
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(residual [T, D], x [T, D], gamma [D], eps) -> (their sum, its RMSNorm)."""
    qk_norm_rope: QkNormRope
    swiglu: Callable[[Tensor], Tensor]
    """[T, 2 F], gate first -> [T, F]."""
    swiglu_keeps_input_alone: bool
    """Whether only the input is saved for backward, so that recomputation would save no memory."""
    noised_rows: Callable[[LatentImages, Tensor, Tensor], NoisedRows]
    """(images, image of each row [g] or -1, patch index in it [g]) -> noised latent tokens and their velocities."""
    flow_loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(v [g, Z], velocity [g, Z], weight [g]) -> weighted mean squared error fp32 [g]."""
    token_loss: TokenLoss | None
    """None: the head makes all logits and hands them to torch or megatron-core."""


def _qk_norm_rope(
    und_UNH: Tensor, gen_GNH: Tensor, und_H: Tensor | None, gen_H: Tensor | None, eps: float, rope: Rope, *,
    engine: Engine,
) -> Tensor:  # fmt: skip
    return qk_norm_rope(und_UNH, gen_GNH, und_H, gen_H, rope.cos_TH, rope.sin_TH, eps, engine=engine)


def _flow_loss(v_gZ: Tensor, target_gZ: Tensor, weight_g: Tensor, *, engine: Engine) -> Tensor:
    return flow.flow_losses(v_gZ, target_gZ, weight_g.contiguous(), engine=engine).total_G


def _kernels(engine: Engine) -> Kernels:
    triton = engine == "triton"
    return Kernels(
        name=engine,
        norm=partial(rms_norm, engine=engine),
        add_norm=partial(add_rms_norm, engine=engine),
        qk_norm_rope=partial(_qk_norm_rope, engine=engine),
        swiglu=partial(swiglu, engine=engine),
        swiglu_keeps_input_alone=triton,
        noised_rows=partial(flow.noised_rows, engine=engine),
        flow_loss=partial(_flow_loss, engine=engine),
        token_loss=partial(linear_cross_entropy, engine=engine) if triton else None,
    )


TORCH = _kernels("torch")
"""For every device and dtype."""


def triton_kernels() -> Kernels:
    """Kernels for a GPU, or for Triton's interpreter. Raises ImportError without Triton."""
    import_module("triton")
    return _kernels("triton")

"""Implementations of the operations between the linears: plain torch, or Triton kernels for a GPU.

One implementation is chosen per run and carried by the layer factory (docs/kernels.md#what-the-model-calls). Both agree
up to rounding, and round bf16 in the same places. Shape letters: docs/notation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Protocol

from megabagel_kernels import flow
from megabagel_kernels.checks import Engine
from megabagel_kernels.flow import LatentImages, NoisedRows
from megabagel_kernels.linear_cross_entropy import VocabShard, linear_cross_entropy
from megabagel_kernels.qk_norm_rope import qk_norm_rope
from megabagel_kernels.qk_norm_rope import torch as torch_qk
from megabagel_kernels.rms_norm import add_rms_norm, rms_norm
from megabagel_kernels.rms_norm import torch as torch_norm
from megabagel_kernels.swiglu import swiglu
from megabagel_kernels.swiglu import torch as torch_swiglu
from torch import Tensor

from megabagel.model.inputs import Constraint, Rope


class QkNormRope(Protocol):
    """QK-norm with the weight of each row's expert (no norm where the weights are None), then RoPE."""

    def __call__(
        self, und_UNH: Tensor, gen_GNH: Tensor, und_H: Tensor | None, gen_H: Tensor | None, eps: float, rope: Rope
    ) -> Tensor:
        """Normalize and rotate the heads of both experts' rows into one tensor.

        Args:
            und_UNH: queries or keys of und rows.
            gen_GNH: the same of gen rows.
            und_H: norm weight of the understanding expert; None without QK-norm.
            gen_H: norm weight of the generation expert; None without QK-norm.
            eps: of the norm.
            rope: rotary tables of the [und | gen] rows.

        Returns:
            [T, N, H], und rows first.
        """


class TokenLoss(Protocol):
    """Fused head and cross-entropy: logits are computed in slices and never in memory all at once."""

    def __call__(self, hidden_QD: Tensor, weight_VD: Tensor, label_Q: Tensor, *, shard: VocabShard) -> Tensor:
        """Return the fp32 cross-entropy [Q] of each row (see `linear_cross_entropy`).

        Args:
            hidden_QD: hidden states after the final norm.
            weight_VD: this rank's rows of the head.
            label_Q: int64 labels in the whole vocabulary.
            shard: this rank's part of the vocabulary and its reductions over tensor-parallel ranks.
        """


@dataclass(frozen=True)
class Kernels:
    """One implementation of all operations between the linears."""

    name: str
    norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [T, D], gamma [D], eps) -> RMSNorm [T, D]."""
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(residual [T, D], x [T, D], gamma [D], eps) -> (their sum, its RMSNorm)."""
    qk_norm_rope: QkNormRope
    norms_heads_apart: bool
    """Whether `qk_norm_rope` also takes a norm weight for each head, [N, H]."""
    swiglu: Callable[[Tensor], Tensor]
    """[T, 2 F], gate first -> [T, F]."""
    swiglu_keeps_input_alone: bool
    """Whether `swiglu` saves only its input for backward, so that recomputing it would save no memory."""
    noised_rows: Callable[[LatentImages, Tensor, Tensor], NoisedRows]
    """(images, image of each row [g] or -1, patch index in the image [g]) -> noised latent tokens and velocities."""
    flow_loss: Callable[[Tensor, Tensor, Tensor, Constraint | None], Tensor]
    """(predicted velocity [g, Z], target velocity [g, Z], weight [g], second target) -> fp32 weighted mean squared
    error [g]."""
    token_loss: TokenLoss | None
    """None: the head computes all logits at once and passes them to torch's or megatron-core's cross-entropy."""


def _qk_norm_rope(
    und_UNH: Tensor, gen_GNH: Tensor, und_H: Tensor | None, gen_H: Tensor | None, eps: float, rope: Rope, *,
    engine: Engine,
) -> Tensor:  # fmt: skip
    return qk_norm_rope(und_UNH, gen_GNH, und_H, gen_H, rope.cos_TH, rope.sin_TH, eps, engine=engine)


def _flow_loss(
    v_gZ: Tensor, target_gZ: Tensor, weight_g: Tensor, constraint: Constraint | None = None, *, engine: Engine
) -> Tensor:
    second = None
    if constraint is not None:
        second = flow.Reference(constraint.target_gZ.contiguous(), constraint.weight_g.contiguous())
    return flow.flow_losses(v_gZ, target_gZ, weight_g.contiguous(), second, engine=engine).total_G


def _kernels(engine: Engine) -> Kernels:
    triton = engine == "triton"
    return Kernels(
        name=engine,
        norm=partial(rms_norm, engine=engine),
        add_norm=partial(add_rms_norm, engine=engine),
        qk_norm_rope=partial(_qk_norm_rope, engine=engine),
        norms_heads_apart=False,
        swiglu=partial(swiglu, engine=engine),
        swiglu_keeps_input_alone=triton,
        noised_rows=partial(flow.noised_rows, engine=engine),
        flow_loss=partial(_flow_loss, engine=engine),
        token_loss=partial(linear_cross_entropy, engine=engine) if triton else None,
    )


def _unchecked_qk_norm_rope(
    und_UNH: Tensor, gen_GNH: Tensor, und_H: Tensor | None, gen_H: Tensor | None, eps: float, rope: Rope
) -> Tensor:
    return torch_qk.qk_norm_rope(und_UNH, gen_GNH, und_H, gen_H, rope.cos_TH, rope.sin_TH, eps)


# Without the argument checks of the public functions, which protect launches of kernels: torch's operations raise by
# themselves, and the checks are a tenth of the time of a decoded token.
TORCH = replace(
    _kernels("torch"),
    norm=torch_norm.rms_norm,
    add_norm=torch_norm.add_rms_norm,
    qk_norm_rope=_unchecked_qk_norm_rope,
    norms_heads_apart=True,
    swiglu=torch_swiglu.swiglu,
)
"""Plain torch, for every device and dtype."""


def triton_kernels() -> Kernels:
    """Return the Triton kernels, for a GPU or for Triton's interpreter.

    Raises:
        ImportError: Triton is not installed.
    """
    # Imported here to fail at start: the kernels would import Triton only in the first step.
    import_module("triton")
    return _kernels("triton")

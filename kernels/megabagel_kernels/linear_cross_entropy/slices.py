"""The algorithm that both engines share: the vocabulary is processed slice by slice.

Forward computes the logits of one slice for all rows, folds them into the running log-sum-exp of each row, and drops
them. Backward computes each slice again, turns it in place into its gradient, and from it makes the slice's rows of dW
and its part of dh.

Slices of the vocabulary rather than chunks of rows (as Liger does): a slice's rows of dW are complete after one GEMM,
so dW is rounded once and needs no fp32 buffer of V x D; and tensor-parallel ranks that split the vocabulary communicate
twice in all, not once per chunk. Logits again in backward rather than gradients in forward: dW needs the gradient of
every row's loss, which forward has only if all are equal; and nothing of size V x D is kept between the passes.
The price is 4 GEMMs of size Q x D x V instead of 3.

Letters: Q rows with cross-entropy, D width, V vocabulary (of this rank), v the tokens of one slice of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE_TOKENS = 8192
"""Vocabulary entries of a slice: logits of 10K rows take 160 MB in bf16, and a GEMM of this width still fills a GPU."""


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary that this tensor-parallel rank holds, and its collectives.

    `all_max` and `all_sum` return the element-wise maximum and sum over ranks; they need not be differentiable.
    """

    first: int = 0
    """Token id of this rank's first row of the weight."""
    all_max: Callable[[Tensor], Tensor] = _alone
    all_sum: Callable[[Tensor], Tensor] = _alone


WHOLE = VocabShard()
"""The whole vocabulary on this rank."""


class SlicePasses(Protocol):
    """The two passes over the logits of a slice.

    `label_Q` is relative to the slice's first token and may lie outside of the slice.
    """

    def accumulate_(self, logits_Qv: Tensor, label_Q: Tensor, lse_Q: Tensor, target_Q: Tensor) -> None:
        """Fold a slice into the running log-sum-exp `lse_Q`; add the label's logit to `target_Q` if it is in here."""

    def gradient_(self, logits_Qv: Tensor, label_Q: Tensor, lse_Q: Tensor, dloss_Q: Tensor) -> None:
        """Overwrite logits with their gradient: dloss * (exp(logit - lse) - one_hot(label))."""


def sliced_cross_entropy(
    hidden_QD: Tensor,
    weight_VD: Tensor,
    label_Q: Tensor,
    ignore: int,
    shard: VocabShard,
    passes: SlicePasses,
    slice_tokens: int,
) -> Tensor:
    """Cross-entropy per row [Q] by the given passes; arguments as in `functional.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(hidden_QD, weight_VD, label_Q, ignore, shard, passes, slice_tokens)


def _slices(weight_VD: Tensor, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """(first token, rows of the weight) of each slice."""
    start = 0
    for weight_vD in weight_VD.split(tokens):
        yield start, weight_vD
        start += len(weight_vD)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_QD: Tensor, weight_VD: Tensor, label_Q: Tensor, ignore: int, shard: VocabShard,
        passes: SlicePasses, tokens: int,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(hidden_QD.dtype, torch.float32)
        lse_Q = hidden_QD.new_full(label_Q.shape, -torch.inf, dtype=wide)
        target_Q = torch.zeros_like(lse_Q)
        for start, weight_vD in _slices(weight_VD, tokens):
            passes.accumulate_(hidden_QD @ weight_vD.T, label_Q - shard.first - start, lse_Q, target_Q)
        peak_Q = shard.all_max(lse_Q)
        total_Q, target_Q = shard.all_sum(torch.stack([(lse_Q - peak_Q).exp(), target_Q]))
        lse_Q = peak_Q + total_Q.log()
        ctx.save_for_backward(hidden_QD, weight_VD, label_Q, lse_Q)
        ctx.ignore, ctx.first, ctx.passes, ctx.tokens = ignore, shard.first, passes, tokens
        return torch.where(label_Q == ignore, 0, lse_Q - target_Q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_Q: Tensor) -> tuple[Tensor | None, ...]:
        hidden_QD, weight_VD, label_Q, lse_Q = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dloss_Q = torch.where(label_Q == ctx.ignore, 0, dloss_Q)
        # dh adds up over slices, in fp32; dW does not, each slice writes its own rows.
        dhidden_QD = torch.zeros_like(hidden_QD, dtype=lse_Q.dtype) if needs_hidden else None
        dweight_VD = torch.empty_like(weight_VD) if needs_weight else None
        for start, weight_vD in _slices(weight_VD, ctx.tokens):
            logits_Qv = hidden_QD @ weight_vD.T
            ctx.passes.gradient_(logits_Qv, label_Q - ctx.first - start, lse_Q, dloss_Q)
            if dhidden_QD is not None:
                dhidden_QD += logits_Qv @ weight_vD
            if dweight_VD is not None:
                torch.mm(logits_Qv.T, hidden_QD, out=dweight_VD[start : start + len(weight_vD)])
        dhidden_QD = None if dhidden_QD is None else dhidden_QD.to(hidden_QD.dtype)
        return dhidden_QD, dweight_VD, *[None] * 5

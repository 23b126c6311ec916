"""Cross-entropy of linear logits over a large, possibly split vocabulary, that never holds all logits.

The vocabulary is cut into slices. Forward makes the logits of one slice for all rows, folds them into the running
log-sum-exp of each row and drops them. Backward makes each slice again, turns it in place into its gradient, and from
it the slice's rows of dW and its part of dh.

Why slices of words and not chunks of rows: a slice's rows of dW are complete after one GEMM (one rounding, no fp32
buffer of V x I), and ranks that split the vocabulary meet twice in all, not once per chunk. Why recompute and not
gradients in forward: dW needs the gradient of every row's loss, which forward does not know unless all are equal; and
nothing of size V x I lives between the passes. The price is the logits GEMM a second time, 4 instead of 3.

Letters: K rows, I hidden width, V words (of this shard), S words of a slice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabagel_kernels.door import INTEGERS, check_device, check_dtype, check_shape

SLICE_WORDS = 8192
"""Logits of 10K rows and one slice take 160 MB in bf16; a GEMM of this width still fills a GPU."""


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class VocabShard:
    """The words that this rank holds, from number `first` on, and how ranks combine small tensors.

    Every rank gets the element-wise maximum or sum over ranks; neither call needs to be differentiable.
    """

    first: int = 0
    all_max: Callable[[Tensor], Tensor] = _alone
    all_sum: Callable[[Tensor], Tensor] = _alone


WHOLE = VocabShard()


class Passes(Protocol):
    """The two passes over the logits of a slice; `label_K` counts from its first word and may lie outside."""

    def fold_(self, logits_KS: Tensor, label_K: Tensor, lse_K: Tensor, target_K: Tensor) -> None:
        """Fold a slice into the running log-sum-exp, and add the label's logit to `target_K` where the slice has it."""

    def gradient_(self, logits_KS: Tensor, label_K: Tensor, lse_K: Tensor, dloss_K: Tensor) -> None:
        """Turn logits into their gradient: dloss * (exp(logit - lse) - [the label's word])."""


def linear_cross_entropy(
    hidden_KI: Tensor,
    weight_VI: Tensor,
    label_K: Tensor,
    *,
    ignore: int = -100,
    shard: VocabShard = WHOLE,
    engine: str = "torch",
    slice_words: int = SLICE_WORDS,
) -> Tensor:
    """Cross-entropy per row, fp32 [K] (fp64 for fp64), 0 and without gradient where the label is `ignore`.

    Logits have the type of their arguments, statistics are fp32. With a shard all ranks get equal losses, and the
    gradient of `hidden_KI` is this shard's part of a sum over ranks. Labels that are no word are not looked for.
    `engine` is "torch" or "triton". Raises ValueError where arguments do not fit.
    """
    if hidden_KI.ndim != 2 or weight_VI.ndim != 2:
        raise ValueError(
            f"hidden_KI {tuple(hidden_KI.shape)}, weight_VI {tuple(weight_VI.shape)}: expected two axes each"
        )
    check_shape("weight_VI", weight_VI, (weight_VI.shape[0], hidden_KI.shape[1]))
    check_dtype("weight_VI", weight_VI, hidden_KI.dtype)
    check_shape("label_K", label_K, hidden_KI.shape[:1])
    check_dtype("label_K", label_K, *INTEGERS)
    check_device(hidden_KI, weight_VI=weight_VI, label_K=label_K)
    if slice_words < 1:
        raise ValueError(f"slice_words is {slice_words}, expected at least 1")
    return _LinearCrossEntropy.apply(hidden_KI, weight_VI, label_K, ignore, shard, _passes(engine), slice_words)


def _passes(engine: str) -> Passes:
    if engine == "torch":
        return TorchPasses()
    if engine == "triton":
        from megabagel_kernels.linear_cross_entropy_triton import TritonPasses

        return TritonPasses()
    raise ValueError(f"engine is {engine!r}, expected 'torch' or 'triton'")


def _slices(weight_VI: Tensor, words: int) -> Iterator[tuple[int, Tensor]]:
    """(first word, rows of the weight) of each slice."""
    start = 0
    for weight_SI in weight_VI.split(words):
        yield start, weight_SI
        start += len(weight_SI)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_KI: Tensor, weight_VI: Tensor, label_K: Tensor, ignore: int, shard: VocabShard,
        passes: Passes, words: int,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(hidden_KI.dtype, torch.float32)
        lse_K = hidden_KI.new_full(label_K.shape, -torch.inf, dtype=wide)
        target_K = torch.zeros_like(lse_K)
        for start, weight_SI in _slices(weight_VI, words):
            passes.fold_(hidden_KI @ weight_SI.T, label_K - shard.first - start, lse_K, target_K)
        peak_K = shard.all_max(lse_K)
        total_K, target_K = shard.all_sum(torch.stack([(lse_K - peak_K).exp(), target_K]))
        lse_K = peak_K + total_K.log()
        ctx.save_for_backward(hidden_KI, weight_VI, label_K, lse_K)
        ctx.ignore, ctx.first, ctx.passes, ctx.words = ignore, shard.first, passes, words
        return torch.where(label_K == ignore, 0, lse_K - target_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_K: Tensor) -> tuple[Tensor | None, ...]:
        hidden_KI, weight_VI, label_K, lse_K = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dloss_K = torch.where(label_K == ctx.ignore, 0, dloss_K)
        dhidden_KI = torch.zeros_like(hidden_KI, dtype=lse_K.dtype) if needs_hidden else None
        dweight_VI = torch.empty_like(weight_VI) if needs_weight else None
        for start, weight_SI in _slices(weight_VI, ctx.words):
            logits_KS = hidden_KI @ weight_SI.T
            ctx.passes.gradient_(logits_KS, label_K - ctx.first - start, lse_K, dloss_K)
            if dhidden_KI is not None:
                dhidden_KI += logits_KS @ weight_SI
            if dweight_VI is not None:
                torch.mm(logits_KS.T, hidden_KI, out=dweight_VI[start : start + len(weight_SI)])
        dhidden_KI = None if dhidden_KI is None else dhidden_KI.to(hidden_KI.dtype)
        return dhidden_KI, dweight_VI, *[None] * 5


class TorchPasses:
    """Plain torch, for every device and type."""

    def fold_(self, logits_KS: Tensor, label_K: Tensor, lse_K: Tensor, target_K: Tensor) -> None:
        """See `Passes`."""
        wide_KS = logits_KS.to(lse_K.dtype)
        torch.logaddexp(lse_K, wide_KS.logsumexp(1), out=lse_K)
        word_K1, here_K = _held(logits_KS, label_K)
        target_K += torch.where(here_K, wide_KS.gather(1, word_K1)[:, 0], 0)

    def gradient_(self, logits_KS: Tensor, label_K: Tensor, lse_K: Tensor, dloss_K: Tensor) -> None:
        """See `Passes`."""
        dlogits_KS = (logits_KS - lse_K[:, None]).exp_().mul_(dloss_K[:, None])
        word_K1, here_K = _held(logits_KS, label_K)
        dlogits_KS.scatter_add_(1, word_K1, torch.where(here_K, -dloss_K, 0)[:, None])
        logits_KS.copy_(dlogits_KS)


def _held(logits_KS: Tensor, label_K: Tensor) -> tuple[Tensor, Tensor]:
    """The label's word in the slice [K, 1], any word where it has none; and whether it has it."""
    words = logits_KS.shape[1]
    return label_K.clamp(0, words - 1).long()[:, None], (label_K >= 0) & (label_K < words)

"""Triton kernels of the passes over a slice of logits (`linear_cross_entropy.Passes`): each reads it once.

Letters: K rows, S words of a slice, COLS of them at a time.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.door import check_launch

COLS, WARPS = 4096, 8


@triton.jit
def fold_slice(LOGITS, LABEL, LSE, TARGET, stride, S, COLS: tl.constexpr):
    """One row: LSE = log(exp(LSE) + sum of exp(logits)), by the online softmax; TARGET += the label's logit."""
    row = tl.program_id(0)
    LOGITS += row.to(tl.int64) * stride
    old = tl.load(LSE + row)
    peak, total = old, 1.0
    for start in range(0, S, COLS):
        columns = start + tl.arange(0, COLS)
        logits = tl.load(LOGITS + columns, mask=columns < S, other=-float("inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(logits, 0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(logits - new_peak), 0)
        peak = new_peak
    tl.store(LSE + row, peak + tl.log(total))
    label = tl.load(LABEL + row)
    if (label >= 0) & (label < S):
        tl.store(TARGET + row, tl.load(TARGET + row) + tl.load(LOGITS + label).to(tl.float32))


@triton.jit
def slice_gradient(LOGITS, LABEL, LSE, DLOSS, stride, S, COLS: tl.constexpr):
    """One piece of a row: logits become dloss * (exp(logit - lse) - [the label's word])."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = LOGITS + row.to(tl.int64) * stride + columns
    logits = tl.load(at, mask=columns < S, other=0.0).to(tl.float32)
    softmax = tl.exp(logits - tl.load(LSE + row))
    one_hot = (columns == tl.load(LABEL + row)).to(tl.float32)
    gradient = tl.load(DLOSS + row) * (softmax - one_hot)
    tl.store(at, gradient.to(LOGITS.dtype.element_ty), mask=columns < S)


class TritonPasses:
    """See `linear_cross_entropy.Passes`. Logits are fp32, bf16 or fp16, the other floats fp32."""

    def fold_(self, logits_KS: Tensor, label_K: Tensor, lse_K: Tensor, target_K: Tensor) -> None:
        """See `Passes`."""
        _fold(logits_KS, label_K, lse_K, target_K)

    def gradient_(self, logits_KS: Tensor, label_K: Tensor, lse_K: Tensor, dloss_K: Tensor) -> None:
        """See `Passes`."""
        _gradient(logits_KS, label_K, lse_K, dloss_K)


@torch.library.custom_op("megabagel::cross_entropy_fold", mutates_args=("lse_K", "target_K"))
def _fold(logits_KS: Tensor, label_K: Tensor, lse_K: Tensor, target_K: Tensor) -> None:
    check_launch(fold_slice, logits_KS)
    rows, words = logits_KS.shape
    if rows:
        fold_slice[(rows,)](logits_KS, label_K, lse_K, target_K, logits_KS.stride(0), words, COLS=COLS, num_warps=WARPS)


@torch.library.custom_op("megabagel::cross_entropy_gradient", mutates_args=("logits_KS",))
def _gradient(logits_KS: Tensor, label_K: Tensor, lse_K: Tensor, dloss_K: Tensor) -> None:
    rows, words = logits_KS.shape
    if rows:
        grid = (rows, triton.cdiv(words, COLS))
        slice_gradient[grid](logits_KS, label_K, lse_K, dloss_K, logits_KS.stride(0), words, COLS=COLS, num_warps=WARPS)


@_fold.register_fake
@_gradient.register_fake
def _(logits_KS: Tensor, label_K: Tensor, first_K: Tensor, second_K: Tensor) -> None:
    """Both write in place."""

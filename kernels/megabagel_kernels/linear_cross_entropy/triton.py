"""The passes over a slice of logits as Triton kernels: each reads the slice once.

`fold_slice` handles a row per program, COLS logits at a time; `slice_gradient` COLS logits of a row per program.

Letters: Q rows with cross-entropy, v tokens of one slice of the vocabulary.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.checks import check_launch

COLS, WARPS = 4096, 8


@triton.jit
def fold_slice(LOGITS, LABEL, LSE, TARGET, stride, tokens, COLS: tl.constexpr):
    """One row: LSE = log(exp(LSE) + sum of exp(logits)) by the online softmax; TARGET += the label's logit, if here."""
    row = tl.program_id(0)
    LOGITS += row.to(tl.int64) * stride
    old = tl.load(LSE + row)
    peak, total = old, 1.0
    for start in range(0, tokens, COLS):
        columns = start + tl.arange(0, COLS)
        logits = tl.load(LOGITS + columns, mask=columns < tokens, other=-float("inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(logits, 0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(logits - new_peak), 0)
        peak = new_peak
    tl.store(LSE + row, peak + tl.log(total))
    label = tl.load(LABEL + row)
    if (label >= 0) & (label < tokens):
        tl.store(TARGET + row, tl.load(TARGET + row) + tl.load(LOGITS + label).to(tl.float32))


@triton.jit
def slice_gradient(LOGITS, LABEL, LSE, DLOSS, stride, tokens, COLS: tl.constexpr):
    """COLS logits of a row become their gradient dloss * (exp(logit - lse) - one_hot(label))."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = LOGITS + row.to(tl.int64) * stride + columns
    logits = tl.load(at, mask=columns < tokens, other=0.0).to(tl.float32)
    softmax = tl.exp(logits - tl.load(LSE + row))
    one_hot = (columns == tl.load(LABEL + row)).to(tl.float32)
    gradient = tl.load(DLOSS + row) * (softmax - one_hot)
    tl.store(at, gradient.to(LOGITS.dtype.element_ty), mask=columns < tokens)


class TritonPasses:
    """See `slices.SlicePasses`. Logits are fp32, bf16 or fp16, the other floats fp32."""

    def accumulate_(self, logits_Qv: Tensor, label_Q: Tensor, lse_Q: Tensor, target_Q: Tensor) -> None:
        """See `slices.SlicePasses`."""
        _accumulate(logits_Qv, label_Q, lse_Q, target_Q)

    def gradient_(self, logits_Qv: Tensor, label_Q: Tensor, lse_Q: Tensor, dloss_Q: Tensor) -> None:
        """See `slices.SlicePasses`."""
        _gradient(logits_Qv, label_Q, lse_Q, dloss_Q)


@torch.library.custom_op("megabagel::cross_entropy_fold", mutates_args=("lse_Q", "target_Q"))
def _accumulate(logits_Qv: Tensor, label_Q: Tensor, lse_Q: Tensor, target_Q: Tensor) -> None:
    check_launch(fold_slice, logits_Qv)
    (rows, tokens), stride = logits_Qv.shape, logits_Qv.stride(0)
    if rows:
        fold_slice[(rows,)](logits_Qv, label_Q, lse_Q, target_Q, stride, tokens, COLS=COLS, num_warps=WARPS)


@torch.library.custom_op("megabagel::cross_entropy_gradient", mutates_args=("logits_Qv",))
def _gradient(logits_Qv: Tensor, label_Q: Tensor, lse_Q: Tensor, dloss_Q: Tensor) -> None:
    (rows, tokens), stride = logits_Qv.shape, logits_Qv.stride(0)
    if rows:
        grid = (rows, triton.cdiv(tokens, COLS))
        slice_gradient[grid](logits_Qv, label_Q, lse_Q, dloss_Q, stride, tokens, COLS=COLS, num_warps=WARPS)


@_accumulate.register_fake
@_gradient.register_fake
def _(logits_Qv: Tensor, label_Q: Tensor, first_Q: Tensor, second_Q: Tensor) -> None:
    """Both write in place and return nothing."""

"""Attention over a set of keys from attention over its parts.

Letters: T queries, N heads, H head dim.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs_TNH: Sequence[Tensor], lses_NT: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys from the (out, lse) of disjoint sets of keys, each part normalised on its own.

    out = sum_p exp(lse_p - lse) out_p with lse = log sum_p exp(lse_p), computed in the dtype of lse. A query that no
    part sees keeps out 0 and lse -inf. Differentiable.
    """
    lse_PNT = torch.stack(list(lses_NT))
    blind_NT = (lse_PNT == -math.inf).all(0)
    peak_NT = lse_PNT.amax(0).masked_fill(blind_NT, 0).detach()
    weight_PNT = (lse_PNT - peak_NT).exp()
    total_NT = weight_PNT.sum(0).masked_fill(blind_NT, 1)
    share_PTN = (weight_PNT / total_NT).transpose(1, 2)
    out_TNH = (share_PTN[..., None] * torch.stack(list(outs_TNH))).sum(0)
    return out_TNH, (peak_NT + total_NT.log()).masked_fill(blind_NT, -math.inf)

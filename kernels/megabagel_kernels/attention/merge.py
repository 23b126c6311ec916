"""Attention over a set of keys from attention over its parts (ring attention, split-KV decoding).

Letters: T queries, N heads, H head dim.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs_TNH: Sequence[Tensor], lses_NT: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys from the (out, lse) of disjoint sets of keys, each normalized over its own keys.

    out = sum_p exp(lse_p - lse) out_p with lse = log sum_p exp(lse_p), computed in the dtype of lse. A query that sees
    no key of any part gets out 0 and lse -inf. Differentiable.
    """
    lses = torch.stack(list(lses_NT))  # [parts, N, T]
    blind_NT = (lses == -math.inf).all(0)
    # Without the masks, -inf minus -inf would be NaN for queries that see nothing.
    peak_NT = lses.amax(0).masked_fill(blind_NT, 0).detach()
    weights = (lses - peak_NT).exp()
    total_NT = weights.sum(0).masked_fill(blind_NT, 1)
    shares = (weights / total_NT).transpose(1, 2)  # [parts, T, N]
    out_TNH = (shares[..., None] * torch.stack(list(outs_TNH))).sum(0)
    return out_TNH, (peak_NT + total_NT.log()).masked_fill(blind_NT, -math.inf)

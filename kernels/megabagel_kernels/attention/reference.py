"""Dense definition of attention under the mask; every engine is compared with it.

Letters: T queries, K keys, N query heads, M key/value heads (N a multiple of M), H head dim.
"""

import math

import torch
from torch import Tensor

from megabagel_kernels.attention.mask import AttentionRanges, dense_mask


def attention_reference(
    q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, ranges: AttentionRanges, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v under the mask, with all T x S scores in memory. Differentiable, also through lse.

    Args:
        q_TNH: [T, N, H] queries.
        k_KMH: [K, M, H] keys; query head n uses key/value head n // (N / M).
        v_KMH: [K, M, H] values.
        ranges: the mask between these queries and keys.
        scale: of the scores; default 1 / sqrt(H).

    Returns:
        out [T, N, H] and the natural-log sum of exponentials lse [N, T], in the dtype of the inputs, at least fp32. A
        query that sees nothing has out 0 and lse -inf.
    """
    dtype = torch.promote_types(q_TNH.dtype, torch.float32)
    group = q_TNH.shape[1] // k_KMH.shape[1]
    q_NTH = q_TNH.to(dtype).transpose(0, 1)
    k_NKH = k_KMH.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
    v_NKH = v_KMH.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
    visible_TK = torch.from_numpy(dense_mask(ranges)).to(q_TNH.device)

    score_NTK = q_NTH @ k_NKH.transpose(1, 2) * (q_TNH.shape[2] ** -0.5 if scale is None else scale)
    lse_NT = score_NTK.masked_fill(~visible_TK, -math.inf).logsumexp(dim=2)
    # Masked again after the subtraction: where lse is -inf, -inf minus -inf is NaN.
    weight_NTK = (score_NTK - lse_NT[..., None]).masked_fill(~visible_TK, -math.inf).exp()
    return (weight_NTK @ v_NKH).transpose(0, 1), lse_NT

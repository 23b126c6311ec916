"""Dense definition of attention under the mask; every engine is compared with it.

Letters: T queries, S keys, N query heads, M key/value heads (N a multiple of M), H head dim.
"""

import math

import torch
from torch import Tensor

from megabagel_kernels.attention.mask import AttentionRanges, dense_mask


def attention_reference(
    q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, ranges: AttentionRanges, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v under the mask, with all T x S scores in memory. Differentiable, also through lse.

    Args:
        q_TNH: [T, N, H] queries.
        k_SMH: [S, M, H] keys; query head n uses key/value head n // (N / M).
        v_SMH: [S, M, H] values.
        ranges: the mask between these queries and keys.
        scale: of the scores; default 1 / sqrt(H).

    Returns:
        out [T, N, H] and the natural-log sum of exponentials lse [N, T], in the dtype of the inputs, at least fp32. A
        query that sees nothing has out 0 and lse -inf.
    """
    dtype = torch.promote_types(q_TNH.dtype, torch.float32)
    group = q_TNH.shape[1] // k_SMH.shape[1]
    q_NTH = q_TNH.to(dtype).transpose(0, 1)
    k_NSH = k_SMH.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
    v_NSH = v_SMH.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
    visible_TS = torch.from_numpy(dense_mask(ranges)).to(q_TNH.device)

    score_NTS = q_NTH @ k_NSH.transpose(1, 2) * (q_TNH.shape[2] ** -0.5 if scale is None else scale)
    lse_NT = score_NTS.masked_fill(~visible_TS, -math.inf).logsumexp(dim=2)
    # Masked again after the subtraction: where lse is -inf, -inf minus -inf is NaN.
    weight_NTS = (score_NTS - lse_NT[..., None]).masked_fill(~visible_TS, -math.inf).exp()
    return (weight_NTS @ v_NSH).transpose(0, 1), lse_NT

"""The one dense reference that tests and benchmarks compare every attention engine with.

Letters: T queries, S keys, N query heads, M key/value heads (N a multiple of M), H head dim.
"""

import math

import torch
from torch import Tensor

from megabagel_kernels.attention.mask import AttentionCodes, dense_mask


def attention_reference(
    q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, codes: AttentionCodes, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v under the mask, by its definition, with all T x S scores in memory.

    Computes in the inputs' dtype, but at least fp32, and returns out [T, N, H] and the natural-log sum of exponentials
    lse [N, T] in that dtype. A query that sees nothing gives out 0 and lse -inf. `scale` defaults to 1 / sqrt(H).
    Differentiable by autograd, also through lse.
    """
    dtype = torch.promote_types(q_TNH.dtype, torch.float32)
    group = q_TNH.shape[1] // k_SMH.shape[1]
    q_NTH = q_TNH.to(dtype).transpose(0, 1)
    k_NSH = k_SMH.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
    v_NSH = v_SMH.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
    visible_TS = torch.from_numpy(dense_mask(codes)).to(q_TNH.device)

    score_NTS = q_NTH @ k_NSH.transpose(1, 2) * (q_TNH.shape[2] ** -0.5 if scale is None else scale)
    lse_NT = score_NTS.masked_fill(~visible_TS, -math.inf).logsumexp(dim=2)
    # Masked after the subtraction: where lse is -inf, the difference of two infinities would be NaN.
    weight_NTS = (score_NTS - lse_NT[..., None]).masked_fill(~visible_TS, -math.inf).exp()
    return (weight_NTS @ v_NSH).transpose(0, 1), lse_NT

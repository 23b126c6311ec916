"""Definition of RMSNorm with the rounding of BAGEL's released model.

Statistics are fp32 (fp64 for fp64 inputs). In bf16 and fp16 the normalized value is rounded to the input's dtype before
it is multiplied with gamma, and the product is rounded again, as Qwen2's RMSNorm does.

Letters: T rows, D width.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """gamma * x / sqrt(mean(x^2) + eps) over the last axis; x is [T, D] or [T, N, H], gamma [D] or [H]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (wide.mul(scale).to(x.dtype) * gamma).to(x.dtype)


def add_rms_norm(residual_TD: Tensor, x_TD: Tensor, gamma_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + x, RMSNorm of that sum), both [T, D]; the norm is of the sum as it is rounded for storage."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    sum_TD = (residual_TD.to(wide) + x_TD).to(x_TD.dtype)
    return sum_TD, rms_norm(sum_TD, gamma_D, eps)

"""Definition of QK-norm + RoPE for the rows of both experts.

Letters: U und rows, G gen rows, T = U + G; N heads, H head dim.
"""

import torch
from torch import Tensor

from megabagel_kernels.rms_norm.reference import rms_norm


def qk_norm_rope(
    und_UNH: Tensor, gen_GNH: Tensor, gamma_und_H: Tensor, gamma_gen_H: Tensor,
    cos_TH: Tensor, sin_TH: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """[T, N, H]: every head normalized with the gamma of its row's expert, then rotated by its row of the tables."""
    normed = [rms_norm(und_UNH, gamma_und_H, eps), rms_norm(gen_GNH, gamma_gen_H, eps)]
    return apply_rope(torch.cat(normed), cos_TH, sin_TH)


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate channel i against channel i + H / 2 ("rotate half", as Qwen2 and Llama in Hugging Face), in fp32."""
    half = x_TNH.shape[2] // 2
    first, second = x_TNH.to(torch.promote_types(x_TNH.dtype, torch.float32)).chunk(2, -1)
    cos, sin = cos_TH[:, None, :half], sin_TH[:, None, :half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_TNH.dtype)

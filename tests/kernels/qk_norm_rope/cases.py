"""QK-norm + RoPE of both experts' rows. Letters: U und rows, G gen rows, T = U + G, N heads, H head dim."""

import torch
from megabagel_kernels.qk_norm_rope import qk_norm_rope, reference
from torch import Tensor

from tests.kernels.case import Case, Numbers

EPS = 0.05
"""Large, so that leaving it out shows."""


def tables(numbers: Numbers, rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, H] of random angles, both halves of a row equal."""
    angle = numbers.normal(rows, head_dim // 2, key="angles", dtype=torch.float32)
    angle_TH = torch.cat([angle, angle], 1)
    return angle_TH.cos(), angle_TH.sin()


def heads(
    numbers: Numbers, num_und: int, num_gen: int, count: int, head_dim: int, dtype: torch.dtype, eps: float = EPS
) -> Case:
    """Heads of both experts, each with a gamma of its own."""
    und_UNH = numbers.normal(num_und, count, head_dim, key="und heads", dtype=dtype)
    gen_GNH = numbers.normal(num_gen, count, head_dim, key="gen heads", dtype=dtype)
    gammas = [1 + numbers.normal(head_dim, key=f"{name} head gamma", dtype=dtype) for name in ("und", "gen")]
    cos_TH, sin_TH = tables(numbers, num_und + num_gen, head_dim)
    return Case(
        f"QK-norm + RoPE {count} x {head_dim}",
        lambda *leaves: qk_norm_rope(*leaves, cos_TH, sin_TH, eps, engine="triton"),
        lambda *leaves: reference.qk_norm_rope(*leaves, cos_TH.to(_wide(leaves[0])), sin_TH.to(_wide(leaves[0])), eps),
        [und_UNH, gen_GNH, *gammas],
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

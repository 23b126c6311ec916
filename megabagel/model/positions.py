"""Position embeddings: the frozen 2-D sin-cos table of visual tokens, and RoPE of all tokens.

Shape letters: docs/notation.md. Ids into the 2-D table come from `megabagel.sequence.grid.grid_ids`.
"""

import torch
from megabagel_kernels import qk_norm_rope
from torch import Tensor


def sincos_table(dim: int, grid: int) -> Tensor:
    """Return the frozen table [grid * grid, dim] float32, added to visual tokens (docs/bagel.md#position-tables).

    Row `r * grid + c` is concat(s(c), s(r)): the first half encodes the column. s(p) = concat(sin(p w), cos(p w)) with
    w_i = 10000 ** (-i / (dim / 4)), computed in float64. `dim` is a multiple of 4.
    """
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)
    axis_hD = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    column_hwD = axis_hD[None, :, :].expand(grid, grid, -1)
    row_hwD = axis_hD[:, None, :].expand(grid, grid, -1)
    return torch.cat([column_hwD, row_hwD], dim=2).reshape(grid * grid, dim)


def rope_tables(positions_T: Tensor, head_dim: int, base: float, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, float32 [T, head_dim] each (docs/bagel.md#rope).

    Args:
        positions_T: RoPE ids.
        head_dim: H, channels of a head; both halves of a row hold the same H / 2 numbers.
        base: RoPE base.
        precision: type that the frequencies are rounded to, `model.rope_precision`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    frequencies = 1.0 / base**exponents
    if precision == "bf16":
        frequencies = frequencies.bfloat16().float()
    # A float32 product, as in pretraining, not a more exact one: at long positions float64 would give other angles.
    angles = torch.outer(positions_T.float(), frequencies)
    angles_TH = torch.cat([angles, angles], dim=1)
    return angles_TH.cos(), angles_TH.sin()


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Apply RoPE (half-split: channel i pairs with i + H/2) in float32 and return the type of `x_TNH`."""
    return qk_norm_rope.apply_rope(x_TNH, cos_TH, sin_TH)

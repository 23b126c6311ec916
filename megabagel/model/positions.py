"""Where a token stands: the frozen 2-D sin-cos table of visual tokens and the rotary embedding of all tokens.

Shape letters: docs/notation.md. Ids into the 2-D table come from `megabagel.sequence.grid.grid_ids`.
"""

import torch
from megabagel_kernels import qk_norm_rope
from torch import Tensor


def sincos_table(dim: int, grid: int) -> Tensor:
    """The frozen table [grid * grid, dim] float32 that is added to visual tokens (docs/bagel.md#position-tables).

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
    """Cosines and sines [T, head_dim] float32 of the rotary angles; both halves of a row hold the same numbers.

    The angles are float32 products, position times base ** (-2 i / head_dim), as in pretraining: at long positions a
    more exact angle would be another angle (docs/bagel.md#rope). `precision` is that of the frequencies.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    frequencies = 1.0 / base**exponents
    if precision == "bf16":
        frequencies = frequencies.bfloat16().float()
    angles = torch.outer(positions_T.float(), frequencies)
    angles_TH = torch.cat([angles, angles], dim=1)
    return angles_TH.cos(), angles_TH.sin()


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate channel i against channel i + H/2 of every head; float32 inside, the type of `x_TNH` outside."""
    return qk_norm_rope.apply_rope(x_TNH, cos_TH, sin_TH)

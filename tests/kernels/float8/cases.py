"""Matrices whose tiles sit on the edges of FP8 scaling."""

import math

import torch
from torch import Tensor


def edges(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random numbers of many sizes, then one row per edge: repeated with another size below where rows remain."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    noise = torch.randn(rows, columns, generator=generator)
    x_TD = noise * 2.0 ** torch.randint(-12, 12, (rows, 1), generator=generator)
    special = [
        0.0, -0.0, math.inf, -math.inf, math.nan, 448.0, 449.0, 3.5, math.nextafter(3.5, 4), 2.0**-126, 2.0**-133,
        2.0**-149, 57344.0, 61440.0, 1.75, 1.7578125, 3e38, 6e-37,
    ]  # fmt: skip
    for row, value in enumerate(special[:rows]):
        x_TD[row] *= 2.0**-40 if abs(value) < 2.0**-100 and value else 0.25
        x_TD[row, row % columns] = value
    if rows > len(special):
        x_TD[len(special)] = 0
        x_TD[len(special), 0] = 1e4  # one outlier
    if rows > len(special) + 1:
        x_TD[len(special) + 1] = math.nan
    return x_TD.to(dtype)

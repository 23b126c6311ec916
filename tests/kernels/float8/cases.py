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


def hashed(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Finite numbers of many sizes, from integers alone: the same bits with every version of torch.

    The first rows are zeros, one outlier among zeros, subnormals, and 1.75 beside its neighbour (448 / 256).
    """
    index = torch.arange(rows * columns).view(rows, columns)
    mixed = (index * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed ^= mixed >> 12
    exponent = 127 + torch.arange(rows)[:, None] * 7 % 24 - 12 - (mixed >> 23 & 7)
    bits = (mixed & 0x807FFFFF) | exponent << 23
    bits[0] = 0
    bits[1] = 0
    bits[1, -1] = 0x461C4000  # 10,000
    bits[2] &= 0x807FFFFF
    bits[3] = 0x3FE00000  # 1.75
    bits[4] = 0x3FE00000
    bits[4, columns // 2] += 0x10001  # its neighbours in fp32 and bf16
    return bits.to(torch.int64).where(bits < 2**31, bits - 2**32).to(torch.int32).view(torch.float32).to(dtype)

"""FP8 formats, the tiles that share one scale, and a quantized matrix."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """An 8-bit float of OCP's OFP8 specification."""

    dtype: torch.dtype
    largest: float
    mantissa_bits: int
    bias: int


E4M3 = Format(torch.float8_e4m3fn, 448.0, 3, 7)
E5M2 = Format(torch.float8_e5m2, 57344.0, 2, 15)


@dataclass(frozen=True)
class Tiles:
    """Shape of the tiles that share a scale, and the numbers a scale may take.

    rows and columns are None for the whole extent. "power_of_two" is fp32 with an empty mantissa, "e8m0" an 8-bit
    exponent.
    """

    rows: int | None
    columns: int | None
    scale: Literal["float32", "power_of_two", "e8m0"]

    def of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a tile in a matrix of this shape, at least 1."""
        rows, columns = shape
        return self.rows or max(rows, 1), self.columns or max(columns, 1)


TENSOR = Tiles(None, None, "float32")
"""Recipe "current": one scale for the tensor."""

ROW_128, COLUMN_128 = Tiles(1, 128, "power_of_two"), Tiles(128, 1, "power_of_two")
"""Recipe "blockwise", activations and gradients: along the width, and along the rows for the weight gradient."""

SQUARE_128 = Tiles(128, 128, "power_of_two")
"""Recipe "blockwise", weights: one scale serves both directions."""

ROW_32, COLUMN_32 = Tiles(1, 32, "e8m0"), Tiles(32, 1, "e8m0")
"""Recipe "mxfp8"."""


@dataclass(frozen=True)
class Quantized:
    """Codes [T, D] in a float8 dtype, and the factor of each tile's codes, fp32 or float8_e8m0fnu."""

    codes: Tensor
    factors: Tensor
    tiles: Tiles

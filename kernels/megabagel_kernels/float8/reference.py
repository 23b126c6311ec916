"""Definition of FP8 quantization: number by number, in Python, from the formats' table of values.

Shares nothing with the engines: codes come from a search for the nearest value, not from casts or bit patterns.
"""

import math
from bisect import bisect_left
from functools import cache

import numpy as np
import torch
from torch import Tensor

from megabagel_kernels.float8.types import Format, Tiles

NAN_CODE = 0x7F
"""The NaN that NVIDIA's conversion instructions produce in both formats, whatever the sign of the input."""


@cache
def values(code: Format) -> list[float]:
    """Non-negative finite values in order; the index is the code."""
    step = 2**code.mantissa_bits
    decoded = [(c % step / step + (c >= step)) * 2.0 ** (max(c // step, 1) - code.bias) for c in range(128)]
    return [value for value in decoded if value <= code.largest]


def encode(x: float, code: Format) -> int:
    """Nearest code, ties to even, saturating (infinity too)."""
    if math.isnan(x):
        return NAN_CODE
    table = values(code)
    size = min(abs(x), code.largest)
    above = bisect_left(table, size)
    below = max(above - 1, 0)
    distance = (size - table[below]) - (table[above] - size)
    chosen = above if distance > 0 or (distance == 0 and above % 2 == 0) else below
    return chosen + (0x80 if math.copysign(1.0, x) < 0 else 0)


def quantize(x: Tensor, code: Format, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Codes [T, D] and scale bytes or fp32 factors per tile, both as Transformer Engine defines them."""
    rows, columns = x.shape
    height, width = tiles.of((rows, columns))
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    factors = torch.zeros(math.ceil(rows / height), math.ceil(columns / width), dtype=torch.float32)
    exponents = torch.zeros(factors.shape, dtype=torch.uint8)
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            top, left = i * height, j * width
            tile = x[top : top + height, left : left + width].float()
            amax = max((abs(v) for v in tile.flatten().tolist() if not math.isnan(v)), default=0.0)
            if tiles.scale == "e8m0":
                exponents[i, j], scale = _exponent(amax, code)
            else:
                largest = torch.finfo(x.dtype if tiles.scale == "power_of_two" else torch.float32).max
                scale = _scale(amax, code, largest, tiles.scale == "power_of_two")
                factors[i, j] = float(np.float32(1) / scale)
            for r, row in enumerate((tile * float(scale)).tolist()):
                for c, value in enumerate(row):
                    codes[top + r, left + c] = encode(value, code)
    return codes, exponents if tiles.scale == "e8m0" else factors


def _scale(amax: float, code: Format, largest: float, power_of_two: bool) -> np.float32:
    """largest code / amax in fp32, 1 where amax says nothing, `largest` instead of infinity."""
    if amax == 0 or math.isinf(amax):
        return np.float32(1)
    with np.errstate(over="ignore"):
        scale = np.float32(code.largest) / np.float32(amax)
    scale = np.float32(largest) if np.isinf(scale) else scale
    return np.float32(2.0 ** (math.frexp(scale)[1] - 1)) if power_of_two else scale


def _exponent(amax: float, code: Format) -> tuple[int, np.float32]:
    """E8M0 exponent of amax / largest, rounded up, and the scale of the data; exponent 0 leaves the data unscaled."""
    if math.isinf(amax):
        return 254, np.float32(0)
    ratio = float(np.float32(amax) * np.float32(1.0 / code.largest))
    exponent = max(math.ceil(math.log2(ratio)) + 127, 0) if ratio else 0
    return exponent, np.float32(2.0 ** (127 - exponent)) if exponent else np.float32(1)

"""FP8 quantization in plain torch, for any device.

Letters: T rows, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from megabagel_kernels.float8.types import Format, Quantized, Tiles


def quantize(x_TD: Tensor, code: Format, tiles: Tiles) -> Quantized:
    """See `functional.quantize`, which has checked the arguments."""
    rows, columns = x_TD.shape
    height, width = tiles.of((rows, columns))
    padded = functional.pad(x_TD.float(), (0, -columns % width, 0, -rows % height))
    tiled = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    # Transformer Engine's kernels take maxima with fmaxf, which ignores NaN; torch.amax would propagate it.
    amax = tiled.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax((1, 3)) if tiled.numel() else _nothing(tiled, tiles)
    if tiles.scale == "e8m0":
        exponents = _exponents(amax, code)
        scale, factors = _data_scale(exponents), exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scale = _scales(amax, code, x_TD.dtype, tiles)
        factors = scale.reciprocal()
    scaled = (tiled * scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return Quantized(saturated(scaled, code), factors, tiles)


def saturated(x: Tensor, code: Format) -> Tensor:
    """Nearest codes of fp32 `x`, ties to even, as the saturating conversion of NVIDIA's GPUs.

    torch rounds e5m2 beyond its largest value to infinity, so the clamp comes first; and it keeps the sign of NaN.
    """
    codes = x.clamp(-code.largest, code.largest).to(code.dtype)
    return codes.view(torch.uint8).masked_fill(x.isnan(), 0x7F).view(code.dtype)


def dequantize(quantized: Quantized) -> Tensor:
    """fp32 [T, D]."""
    rows, columns = quantized.codes.shape
    height, width = quantized.tiles.of((rows, columns))
    factors = quantized.factors.float()
    return (
        quantized.codes.float() * factors.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    )


def _nothing(tiled: Tensor, tiles: Tiles) -> Tensor:
    """Maxima of an empty matrix: a tensor-wide scale still exists, tiles do not."""
    return tiled.new_zeros(1, 1) if tiles.rows is None else tiled.new_zeros(tiled.shape[0], tiled.shape[2])


def _scales(amax: Tensor, code: Format, source: torch.dtype, tiles: Tiles) -> Tensor:
    """largest / amax; 1 for an amax of 0 or infinity; the largest finite number where the quotient overflows."""
    exact = tiles.scale == "power_of_two"
    scale = quotient(code.largest, amax)
    scale = torch.where(scale.isinf(), torch.finfo(source if exact else torch.float32).max, scale)
    scale = torch.where((amax == 0) | amax.isinf(), 1.0, scale)
    # 448 / amax rounded down to a power of two by cutting the mantissa: log2 is inexact beside powers of two.
    return (scale.view(torch.int32) & 0x7F800000).view(torch.float32) if exact else scale


def quotient(number: float, x: Tensor) -> Tensor:
    """number / x in fp32, rounded once, as the kernels' __fdiv_rn.

    `number / x` in torch is x.reciprocal() * number: another scale for 28 % of all amax, and beyond 2^126, where the
    reciprocal is subnormal, another power of two for some.
    """
    return torch.full_like(x, number) / x


def _exponents(amax: Tensor, code: Format) -> Tensor:
    """Biased E8M0 exponents of amax / largest, rounded up, so that no tile saturates.

    OCP's MX 1.0 takes floor(log2 amax) - 8 instead and clips tiles whose amax has a mantissa above 1.75. torch's cast
    to float8_e8m0fnu rounds to nearest.
    """
    bits = (amax * (1.0 / code.largest)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Below 2^-126 the step is from 2^-127 (exponent 0, mantissa 0x400000) to 2^-126.
    up = torch.where(exponent == 0, mantissa > 0x400000, mantissa > 0)
    return torch.where(amax.isinf(), 254, exponent + up.int())


def _data_scale(exponents: Tensor) -> Tensor:
    """2^(127 - exponent); exponent 0 leaves the data unscaled and 254 (infinity) multiplies by 0, as the kernels do."""
    return torch.where(exponents == 0, 1.0, ((254 - exponents) << 23).view(torch.float32))

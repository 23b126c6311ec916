"""FP8 quantization of tiles of one row as a Triton kernel.

Codes are computed with integers, not with the GPU's conversion instruction: sm_80 has none, and Triton's interpreter
rounds its own way. A pass over memory hides the extra operations.

Letters: T rows, D width.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.checks import check_launch
from megabagel_kernels.float8.types import E4M3, E5M2, Format, Quantized, Tiles

COLUMNS, WARPS = 1024, 4
"""Columns of a program: eight for each thread, one wide load of bf16."""


@triton.jit
def _encoded(y, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Codes of fp32 `y` as integers: nearest, ties to even, saturating; NaN gives 0x7F."""
    bits = y.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(y), LARGEST)
    rounded = size.to(tl.int32, bitcast=True)
    shift: tl.constexpr = 23 - MANTISSA
    rounded += (1 << (shift - 1)) - 1 + ((rounded >> shift) & 1)
    normal = (rounded >> shift) - ((127 - BIAS) << MANTISSA)
    # In [step * 2^23, step * 2^24) fp32 numbers are multiples of the subnormal step: the addition rounds.
    anchor: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    anchor_bits: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    subnormal = (size + anchor).to(tl.int32, bitcast=True) - anchor_bits
    smallest: tl.constexpr = 2.0 ** (1 - BIAS)
    code = tl.where(size < smallest, subnormal, normal) | ((bits >> 24) & 0x80)
    return tl.where(y == y, code, 0x7F)


@triton.jit
def quantize_rows(
    X, CODES, FACTORS, stride, D, factor_stride, OVERFLOW: tl.constexpr, E8M0: tl.constexpr, LARGEST: tl.constexpr,
    INVERSE: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """CODES [T, D] in bytes and FACTORS [T, tiles], fp32 or E8M0 bytes; a program handles TILES tiles of one row."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    columns = tile[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = columns < D
    x = tl.load(X + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.where(x == x, tl.abs(x), 0.0), 1)  # NaN is ignored, as fmaxf does
    infinite = amax == float("inf")
    if E8M0:
        ratio = (amax * INVERSE).to(tl.int32, bitcast=True)
        exponent, mantissa = ratio >> 23, ratio & 0x7FFFFF
        exponent += tl.where(exponent == 0, mantissa > 0x400000, mantissa > 0).to(tl.int32)
        exponent = tl.where(infinite, 254, exponent)
        scale = tl.where(exponent == 0, 1.0, ((254 - exponent) << 23).to(tl.float32, bitcast=True))
        factor = exponent.to(tl.uint8)
    else:
        nothing = (amax == 0.0) | infinite
        # div_rn: the fast division is off by an ulp, and beside a power of two that is a factor of two here.
        scale = tl.div_rn(tl.full([TILES], LARGEST, tl.float32), tl.where(nothing, LARGEST, amax))
        bits = tl.where(scale == float("inf"), OVERFLOW, scale).to(tl.int32, bitcast=True)
        scale = (bits & 0x7F800000).to(tl.float32, bitcast=True)
        factor = tl.div_rn(tl.full([TILES], 1.0, tl.float32), scale)
    codes = _encoded(x * scale[:, None], LARGEST, MANTISSA, BIAS)
    tl.store(CODES + row * D + columns, codes.to(tl.uint8), mask=inside)
    tl.store(FACTORS + row * factor_stride + tile, factor, mask=tile < factor_stride)


def quantize(x_TD: Tensor, code: Format, tiles: Tiles) -> Quantized:
    """See `functional.quantize`, which has checked the arguments."""
    assert tiles.columns is not None
    e8m0 = tiles.scale == "e8m0"
    codes, factors = _quantize(x_TD, code == E4M3, tiles.columns, e8m0)
    return Quantized(codes.view(code.dtype), factors.view(torch.float8_e8m0fnu) if e8m0 else factors, tiles)


@torch.library.custom_op("megabagel::quantize_rows", mutates_args=())
def _quantize(x_TD: Tensor, e4m3: bool, width: int, e8m0: bool) -> tuple[Tensor, Tensor]:
    """Codes [T, D] in bytes, and factors [T, tiles] in fp32 or, for E8M0, bytes."""
    check_launch(quantize_rows, x_TD)
    code = E4M3 if e4m3 else E5M2
    codes, factors = _outputs(x_TD, width, e8m0)
    rows, columns = x_TD.shape
    if x_TD.numel():
        count, together = factors.shape[1], max(1, COLUMNS // width)
        quantize_rows[rows, triton.cdiv(count, together)](
            x_TD, codes, factors, x_TD.stride(0), columns, count, OVERFLOW=torch.finfo(x_TD.dtype).max, E8M0=e8m0,
            LARGEST=code.largest, INVERSE=1.0 / code.largest, MANTISSA=code.mantissa_bits, BIAS=code.bias,
            WIDTH=width, TILES=together, num_warps=WARPS,
        )  # fmt: skip
    return codes, factors


@_quantize.register_fake
def _(x_TD: Tensor, e4m3: bool, width: int, e8m0: bool) -> tuple[Tensor, Tensor]:
    return _outputs(x_TD, width, e8m0)


def _outputs(x_TD: Tensor, width: int, e8m0: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x_TD.shape
    factors = x_TD.new_empty(rows, -(-columns // width), dtype=torch.uint8 if e8m0 else torch.float32)
    return x_TD.new_empty(rows, columns, dtype=torch.uint8), factors

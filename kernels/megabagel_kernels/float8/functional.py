"""Quantization to FP8 and back, by the rules of Transformer Engine 2.11's kernels.

Letters: T rows, D width, W history length.
"""

import math

import torch
from torch import Tensor

from megabagel_kernels.checks import FLOATS, Engine, check_axes, check_dtype, check_engine, check_layout, check_shape
from megabagel_kernels.float8 import torch as torch_engine
from megabagel_kernels.float8.types import TENSOR, Format, Quantized, Tiles


def quantize(x: Tensor, code: Format, tiles: Tiles, *, engine: Engine = "torch") -> Quantized:
    """Codes and factors of a matrix, with scales from its own maxima.

    Args:
        x: [T, D], fp32, bf16 or fp16.
        code: E4M3 or E5M2.
        tiles: what shares a scale. "triton" takes tiles of one row.
        engine: "torch" or "triton", equal bit for bit.

    Raises:
        ValueError: an argument that does not fit.
    """
    check_engine(engine)
    check_axes("x", x, "T, D")
    check_dtype("x", x, *FLOATS)
    if engine == "torch":
        return torch_engine.quantize(x, code, tiles)
    if tiles.rows != 1:
        raise ValueError(f"tiles are {tiles}, engine 'triton' expects tiles of one row: use the torch engine")
    from megabagel_kernels.float8 import triton as triton_engine

    check_layout("x", x)
    return triton_engine.quantize(x, code, tiles)


def quantize_with_scale(x: Tensor, code: Format, scale: Tensor) -> tuple[Quantized, Tensor]:
    """Quantize [T, D] with a scale known beforehand, fp32 [1]; also the amax [1] that delayed scaling records."""
    check_axes("x", x, "T, D")
    check_dtype("x", x, *FLOATS)
    check_shape("scale", scale, (1,))
    check_dtype("scale", scale, torch.float32)
    wide = x.float()
    sizes = wide.abs().nan_to_num(nan=0.0, posinf=math.inf)
    amax = sizes.amax().view(1) if x.numel() else wide.new_zeros(1)
    factors = scale.reciprocal().view(1, 1)
    return Quantized(torch_engine.saturated(wide * scale, code), factors, TENSOR), amax


def updated_scale(
    history_W: Tensor, scale: Tensor, amax: Tensor, code: Format, margin: int = 0
) -> tuple[Tensor, Tensor]:
    """Delayed scaling at the end of a step: the new history and the scale of the next step.

    The scale is that of the largest amax in the history, this step's included; a maximum of 0, infinity or NaN leaves
    the scale as it was.

    Args:
        history_W: fp32 [W], newest last; entry 0 is the free slot.
        scale: fp32 [1], of this step.
        amax: fp32 [1], of this step.
        code: E4M3 or E5M2.
        margin: the scale is divided by 2^margin.
    """
    check_axes("history_W", history_W, "W")
    check_shape("scale", scale, (1,))
    check_shape("amax", amax, (1,))
    filled = torch.cat([amax, history_W[1:]])
    largest = filled.amax().view(1)
    found = torch_engine.quotient(code.largest * 2.0**-margin, largest).clamp(max=torch.finfo(torch.float32).max)
    usable = largest.isfinite() & (largest > 0)
    rolled = filled.roll(-1)
    rolled[0] = 0
    return rolled, torch.where(usable, found, scale)


def dequantize(quantized: Quantized) -> Tensor:
    """fp32 [T, D]: each code times the factor of its tile."""
    return torch_engine.dequantize(quantized)

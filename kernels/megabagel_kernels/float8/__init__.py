"""FP8 quantization with Transformer Engine's scaling recipes (https://arxiv.org/abs/2209.05433 for the formats)."""

from megabagel_kernels.float8.functional import dequantize, quantize, quantize_with_scale, updated_scale
from megabagel_kernels.float8.types import (
    COLUMN_32,
    COLUMN_128,
    E4M3,
    E5M2,
    ROW_32,
    ROW_128,
    SQUARE_128,
    TENSOR,
    Format,
    Quantized,
    Tiles,
)

__all__ = [
    "COLUMN_32", "COLUMN_128", "E4M3", "E5M2", "ROW_32", "ROW_128", "SQUARE_128", "TENSOR", "Format", "Quantized",
    "Tiles", "dequantize", "quantize", "quantize_with_scale", "updated_scale",
]  # fmt: skip

"""Triton helper: rounding where the released model rounds, while the arithmetic stays in fp32."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def round_like(x, LIKE):
    """fp32 `x` rounded to the dtype that pointer LIKE points to, and back to fp32."""
    return x.to(LIKE.dtype.element_ty).to(tl.float32)

"""Makes Triton's CPU interpreter compute in bf16, for tests only.

The interpreter keeps bf16 as raw 16-bit patterns, does arithmetic on the patterns themselves, and narrows fp32 by
cutting bits off. With the shim, bf16 operands are widened to fp32 before every operation, and results are rounded to
the nearest bf16, ties to even, as GPUs do. A reduction over bf16 is an error: kernels are to reduce in fp32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers behind bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Bit patterns of the nearest bf16 numbers, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def as_fp32(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def in_fp32(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The operation on widened operands, its result rounded to bf16 unless it is a comparison."""

    def repaired(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if not any(is_bf16(operand) for operand in operands):
            return operation(self, *operands)
        result = operation(self, *(as_fp32(operand) for operand in operands))
        data = result.data if result.data.dtype == np.bool_ else narrow(result.data)
        return TensorHandle(data, tl.bfloat16)

    return repaired


def install() -> None:
    """Repair the interpreter of this process."""
    builder = InterpreterBuilder
    for name in ("binary_op", "ternary_op", "unary_op", "create_fma"):
        setattr(builder, name, in_fp32(getattr(builder, name)))
    cast, dot, reduce = builder.cast_impl, builder.create_dot, interpreter.ReduceOps.apply_impl

    def repaired_cast(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype, *rounding: Any) -> TensorHandle:
        source = as_fp32(source)
        if to.scalar == tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return source if to.scalar == source.dtype.scalar else cast(self, source, to)

    def repaired_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        # fp16 is widened as well, for speed: NumPy multiplies fp32 matrices with BLAS. Its products fit fp32 exactly.
        wide = (TensorHandle(as_fp32(x).data.astype(np.float32), tl.float32) for x in (a, b))
        return dot(self, *wide, *rest)

    def refusing_reduce(self: Any, operands: tuple[Any, ...]) -> Any:
        assert all(x.dtype.scalar != tl.bfloat16 for x in operands), "reduction over bf16: cast to fp32 first"
        return reduce(self, operands)

    builder.cast_impl = builder.create_fp_to_fp = repaired_cast
    builder.create_dot = repaired_dot
    interpreter.ReduceOps.apply_impl = refusing_reduce

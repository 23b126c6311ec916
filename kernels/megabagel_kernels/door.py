"""Checks of kernel arguments before any launch. Each raises one ValueError that names the argument and both values.

They read sizes, types and strides alone, so they cost no wait for the device and work on meta tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)

OFFSET_LIMIT = 2**31
"""Kernels hold element offsets as int32."""


def check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Raise unless `x` has exactly this shape."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    """Raise unless the type of `x` is one of these."""
    if x.dtype not in allowed:
        raise ValueError(f"{name} has type {x.dtype}, expected {' or '.join(map(str, allowed))}")


def check_device(like: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless every tensor lies where `like` does."""
    for name, x in tensors.items():
        if x is not None and x.device != like.device:
            raise ValueError(f"{name} lies on {x.device}, the first argument on {like.device}")


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high}")


def check_layout(name: str, x: Tensor, inner: int = 1) -> None:
    """Raise unless the last `inner` axes lie dense (rows may have any stride) and offsets fit int32."""
    expected = 1
    for axis in range(x.ndim - 1, x.ndim - 1 - inner, -1):
        if x.shape[axis] > 1 and x.stride(axis) != expected:
            raise ValueError(
                f"{name} has stride {x.stride(axis)} along axis {axis}, expected {expected}: call .contiguous() first"
            )
        expected *= x.shape[axis]
    check_span(name, x)


def check_span(name: str, x: Tensor) -> None:
    """Raise unless offsets fit int32, both in `x` and in a dense tensor of its shape."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if x.numel() and max(last, x.numel() - 1) >= OFFSET_LIMIT:
        raise ValueError(
            f"{name} reaches element offset {max(last, x.numel() - 1)}, expected less than {OFFSET_LIMIT} (2^31)"
        )


def check_launch(kernel: Any, x: Tensor) -> None:
    """Raise where a compiled kernel would be given a tensor that is not on a GPU; the interpreter takes any."""
    from triton.runtime import JITFunction

    if isinstance(kernel, JITFunction) and not x.is_cuda:
        raise ValueError(f"Triton kernels run on cuda, the arguments lie on {x.device}: use the torch reference there")

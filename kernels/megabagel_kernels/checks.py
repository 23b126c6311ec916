"""Argument checks that run before a launch; each raises one ValueError with the argument's name, value and expectation.

They read shapes, dtypes, devices and strides only, never values, so they do not synchronize with the GPU and accept
meta tensors.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Engine = Literal["torch", "triton"]
"""Implementation of an operation: plain torch for any device, or Triton kernels for a GPU (or Triton's interpreter)."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the Triton kernels take."""

ANY_FLOAT = (*FLOATS, torch.float64)
"""Dtypes that the torch engines take; fp64 serves gradient checks."""

INTEGERS = (torch.int32, torch.int64)

OFFSET_LIMIT = 2**31
"""Most kernels hold element offsets as int32: 64-bit addresses would cost registers in every inner loop."""


def check_engine(engine: str) -> None:
    """Raise unless `engine` is one of `Engine`."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine is {engine!r}, expected 'torch' or 'triton'")


def check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Raise unless `x` has exactly this shape."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")


def check_axes(name: str, x: Tensor, axes: str) -> None:
    """Raise unless `x` has as many axes as `axes` names, such as "T, D"."""
    if x.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [{axes}]")


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    """Raise unless the dtype of `x` is one of these."""
    if x.dtype not in allowed:
        raise ValueError(f"{name} has dtype {x.dtype}, expected {' or '.join(map(str, allowed))}")


def check_device(like: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless every tensor is on the device of `like`."""
    for name, x in tensors.items():
        if x is not None and x.device != like.device:
            raise ValueError(f"{name} is on {x.device}, the first argument on {like.device}")


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high}")


def check_layout(name: str, x: Tensor, inner: int = 1) -> None:
    """Raise unless the last `inner` axes are contiguous (leading axes may have any stride) and offsets fit int32."""
    expected = 1
    for axis in range(x.ndim - 1, x.ndim - 1 - inner, -1):
        if x.shape[axis] > 1 and x.stride(axis) != expected:
            raise ValueError(
                f"{name} has stride {x.stride(axis)} along axis {axis}, expected {expected}: call .contiguous() first"
            )
        expected *= x.shape[axis]
    check_span(name, x)


def check_span(name: str, x: Tensor) -> None:
    """Raise unless element offsets fit int32, both in `x` and in a contiguous tensor of its shape (an output)."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if x.numel() and max(last, x.numel() - 1) >= OFFSET_LIMIT:
        raise ValueError(
            f"{name} reaches element offset {max(last, x.numel() - 1)}, expected less than {OFFSET_LIMIT} (2^31)"
        )


def check_launch(kernel: Any, x: Tensor) -> None:
    """Raise if a compiled kernel would get a tensor that is not on a GPU; Triton's interpreter takes any tensor."""
    from triton.runtime import JITFunction

    if isinstance(kernel, JITFunction) and not x.is_cuda:
        raise ValueError(f"Triton kernels run on cuda, the arguments are on {x.device}: use the torch engine there")

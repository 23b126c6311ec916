"""Memory in which errors of a kernel show: inputs lie between NaN, outputs hold NaN between NaN until written."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BESIDE = 16
"""Rows and columns of NaN around an input; as columns they keep rows on whole 32 bytes, as in training."""

AROUND = 8192
"""Numbers of NaN before and after an output."""


def guarded(x: Tensor) -> Tensor:
    """A copy whose rows are separated by NaN; all axes but the first are contiguous."""
    shape = x.shape
    flat = x.reshape(1, -1) if x.ndim == 1 else x.flatten(1)
    rows, columns = flat.shape
    room = torch.full((rows + 2 * BESIDE, columns + 2 * BESIDE), math.nan, dtype=x.dtype, device=x.device)
    inner = room[BESIDE:-BESIDE, BESIDE:-BESIDE].copy_(flat)
    return inner[0] if x.ndim == 1 else inner.unflatten(1, shape[1:])


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Inside, new float tensors hold NaN between NaN. On exit, ValueError if memory around one of them was written."""
    empty, new_empty, guards = torch.empty, Tensor.new_empty, []

    def allocate(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(size)
        room = torch.full((count + 2 * AROUND,), math.nan, dtype=dtype, device=device)
        if type(room) is not Tensor or room.is_meta:  # while torch.compile traces
            return empty(size, dtype=dtype, device=device)
        guards.extend([room[:AROUND], room[AROUND + count :]])
        return room[AROUND : AROUND + count].view(*size)

    def of_torch(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point or rest:
            return empty(*size, dtype=dtype, device=device, **rest)
        return allocate(_sizes(size), dtype, device)

    def of_tensor(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        dtype = dtype or self.dtype
        if not dtype.is_floating_point or rest or type(self) is not Tensor:
            return new_empty(self, *size, dtype=dtype, **rest)
        return allocate(_sizes(size), dtype, self.device)

    with mock.patch("torch.empty", of_torch), mock.patch.object(Tensor, "new_empty", of_tensor):
        yield
    if not all(bool(guard.isnan().all()) for guard in guards):
        raise ValueError("a kernel wrote outside its output")


def _sizes(size: tuple[Any, ...]) -> Sequence[int]:
    return size[0] if isinstance(size[0], Sequence) else size

"""Records of many arrays in one buffer: they cross processes and reach a GPU in one copy.

A record is a dataclass whose fields are arrays, other records, or plain values. Its arrays are copied into one buffer
of bytes; what remains is the same record with a `Span` for each array, from which views are made of the buffer or of
its copy on a device.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64
"""Bytes; of every array: a cache line, and more than any type or vector instruction needs."""


@dataclass(frozen=True)
class Span:
    """Where an array lies in a buffer."""

    start: int
    stop: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The array, without a copy, on the buffer's device."""
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        return buffer[self.start : self.stop].view(dtype).view(self.shape)


def map_fields(record: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The record with `function` applied to every field of type `kind`, in order, also in records inside it."""

    def mapped(value: Any) -> Any:
        if isinstance(value, kind):
            return function(value)
        return map_fields(value, kind, function) if is_dataclass(value) else value

    return replace(record, **{field.name: mapped(getattr(record, field.name)) for field in fields(record)})


def gather_arrays(record: Any) -> tuple[torch.Tensor, Any]:
    """(uint8 buffer with a copy of every array of the record, the record with a `Span` in place of each)."""
    arrays: list[np.ndarray] = []
    end = 0

    def place(array: np.ndarray) -> Span:
        nonlocal end
        arrays.append(array)
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + array.nbytes
        return Span(start, end, array.dtype, array.shape)

    spans = map_fields(record, np.ndarray, place)
    buffer = torch.zeros(end, dtype=torch.uint8)  # torch aligns its storages to 64 bytes; NumPy does not

    def fill(span: Span) -> None:
        span.view(buffer).numpy()[...] = arrays.pop(0)

    map_fields(spans, Span, fill)
    return buffer, spans

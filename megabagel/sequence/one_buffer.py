"""Packing of dataclasses with many arrays into one byte buffer, for one inter-process transfer and one copy to a GPU.

A record is a dataclass whose fields are arrays, other records, or plain values. Its arrays are copied into one uint8
tensor; the same record with a `Span` in place of each array is enough to make views of the buffer, or of a copy of the
buffer on a device.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64
"""Alignment in bytes of every array in the buffer: one cache line, and more than any dtype or vector load needs."""


@dataclass(frozen=True)
class Span:
    """Byte range [start, stop), dtype and shape of an array in a buffer."""

    start: int
    stop: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the array as a view of `buffer`, on its device."""
        # torch has no public function from a NumPy dtype to its own; an empty array gives it.
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        return buffer[self.start : self.stop].view(dtype).view(self.shape)


def map_fields(record: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return the record with `function` applied to every field of type `kind`, in order of fields, nested ones too."""

    def mapped(value: Any) -> Any:
        if isinstance(value, kind):
            return function(value)
        return map_fields(value, kind, function) if is_dataclass(value) else value

    return replace(record, **{field.name: mapped(getattr(record, field.name)) for field in fields(record)})


def gather_arrays(record: Any) -> tuple[torch.Tensor, Any]:
    """Copy every array of `record` into one buffer.

    Returns:
        (uint8 buffer, the record with a `Span` in place of each array).
    """
    arrays: list[np.ndarray] = []
    end = 0

    def place(array: np.ndarray) -> Span:
        nonlocal end
        arrays.append(array)
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + array.nbytes
        return Span(start, end, array.dtype, array.shape)

    spans = map_fields(record, np.ndarray, place)
    # A torch tensor, because torch aligns its storages to 64 bytes and NumPy does not.
    buffer = torch.zeros(end, dtype=torch.uint8)

    # `map_fields` visits fields in the same order as in the first pass, so the arrays can be taken from the front.
    def fill(span: Span) -> None:
        span.view(buffer).numpy()[...] = arrays.pop(0)

    map_fields(spans, Span, fill)
    return buffer, spans

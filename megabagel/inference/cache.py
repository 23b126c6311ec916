"""KV cache: one pool of rows per layer for all requests, allocated in pages and never moved.

Both experts share the rows, since attention treats their keys alike. There is no paged-attention kernel: the visible
keys of a query are a list of cache rows and mask integers (`segments.mask_codes`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megabagel.errors import UserError

PAGE = 64
"""Rows of a page."""


class KVCache:
    """Keys (after norm and rotation) and values of this rank's layers and heads."""

    def __init__(
        self, layers: Iterable[int], pages: int, kv_heads: int, head: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pages, self.rows = pages, pages * PAGE
        shape = (self.rows + 1, kv_heads, head)  # the last row takes what padding rows would write
        self.keys: dict[int, Tensor] = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self.values: dict[int, Tensor] = {layer: torch.zeros_like(keys) for layer, keys in self.keys.items()}
        self._free = np.ones(pages, bool)

    @property
    def trash(self) -> int:
        """Row that takes the keys and values of padding."""
        return self.rows

    @property
    def free_pages(self) -> int:
        """Pages that no request holds."""
        return int(self._free.sum())

    def write(self, layer: int, slots_T: Tensor, k_TMH: Tensor, v_TMH: Tensor) -> None:
        """Store new keys and values.

        Args:
            layer: number of the layer in the whole model.
            slots_T: int64 cache rows to write; `trash` for padding.
            k_TMH: keys, after norm and rotation.
            v_TMH: values.
        """
        self.keys[layer].index_copy_(0, slots_T, k_TMH)
        self.values[layer].index_copy_(0, slots_T, v_TMH)

    def take(self, count: int) -> np.ndarray:
        """Allocate `count` pages, contiguous ones if possible, so that attention reads a view instead of a gather.

        Raises UserError when there are not so many.
        """
        if count > self.free_pages:
            raise UserError(
                f"KV cache: {count * PAGE} rows wanted, {self.free_pages * PAGE} of {self.rows} are free; wait for "
                "other requests to end, or load the model with more cache_tokens"
            )
        runs: np.ndarray = np.zeros(0, np.int64)
        if count:
            runs = np.flatnonzero(np.convolve(self._free, np.ones(count, int), "valid") == count)
        found = runs[0] + np.arange(count) if len(runs) else np.flatnonzero(self._free)[:count]
        self._free[found] = False
        return found.astype(np.int64)

    def give_back(self, pages: np.ndarray) -> None:
        """Free pages."""
        self._free[pages] = True


@dataclass
class Arena:
    """Cache rows of one request or session, freed together."""

    cache: KVCache
    _pages: list[np.ndarray] = field(default_factory=list)
    _rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Rows at hand, in order."""

    @property
    def at_hand(self) -> int:
        """Rows that can be taken without another page."""
        return len(self._rows)

    def reserve(self, rows: int) -> None:
        """Make sure that `rows` more can be taken."""
        missing = rows - len(self._rows)
        if missing > 0:
            pages = self.cache.take(-(-missing // PAGE))
            self._pages.append(pages)
            fresh = (pages[:, None] * PAGE + np.arange(PAGE)).reshape(-1)
            self._rows = np.concatenate([self._rows, fresh])

    def take(self, rows: int) -> np.ndarray:
        """Cache rows for new tokens (int64). Raises UserError when the cache is full."""
        self.reserve(rows)
        taken, self._rows = self._rows[:rows], self._rows[rows:]
        return taken

    def give_back(self, rows: np.ndarray) -> None:
        """Rows whose content is no longer needed; the next `take` gets them first."""
        self._rows = np.concatenate([rows, self._rows])

    def close(self) -> None:
        """Free all pages."""
        for pages in self._pages:
            self.cache.give_back(pages)
        self._pages, self._rows = [], np.zeros(0, np.int64)

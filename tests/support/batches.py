"""Comparing packed batches."""

import numpy as np
import torch

from megabagel.sequence.batch import PackedBatch


def assert_same(found: PackedBatch, batch: PackedBatch) -> None:
    """Two batches, bit for bit."""
    assert torch.equal(found.words, batch.words)
    for name in ("patches", "pixels"):
        mine, theirs = getattr(found, name), getattr(batch, name)
        assert len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
    assert np.array_equal(found.layout.token_R, batch.layout.token_R) and found.layout.num_und == batch.layout.num_und
    for name in ("kind_S", "position_S", "ce_S", "sample_S", "fill_S", "noised_S"):
        assert np.array_equal(getattr(found.pack, name), getattr(batch.pack, name))
    assert [(s.key, s.items, s.latents) for s in found.pack.samples] == [
        (s.key, s.items, s.latents) for s in batch.pack.samples
    ]

"""Batches of one rank without attention plans, their token ids, and whether two are the same."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from megabagel.config.schema import Config
from megabagel.sequence.batch import BatchBuilder, PackedBatch
from megabagel.sequence.items import Vit
from megabagel.sequence.rank_rows import RankPlace
from megabagel.sequence.sample import TEXT


def no_plan(codes: object, head_dim: int) -> None:
    """An attention engine that plans nothing."""


def batch_builder(config: Config, place: RankPlace | None = None) -> BatchBuilder:
    """For the only rank of a run, or one of several."""
    return BatchBuilder(config, place or RankPlace(), no_plan)


def token_ids(*ranks: PackedBatch) -> list[int]:
    """Ids of a pack's text tokens in token order, from its context-parallel ranks' rows."""
    found: dict[int, int] = {}
    for cp, batch in enumerate(ranks):
        rows = batch.rows.arrays()
        for token, token_id, is_text in zip(batch.layout.split(cp)[0], rows.token_id_U, rows.is_text_U, strict=True):
            if is_text:
                assert token not in found
                found[token] = int(token_id)
    return [found[token] for token in np.flatnonzero(ranks[0].pack.kind_S == TEXT)]


def patches_of(batch: PackedBatch, images: Iterable[Vit]) -> list[torch.Tensor]:
    """Patches of each image that a rank encodes; what is left is padding."""
    assert batch.patches is not None
    sizes = [image.rows * image.cols for image in images]
    *found, padding = batch.patches.split([*sizes, len(batch.patches) - sum(sizes)])
    assert not padding.any()
    return found


def assert_same(found: PackedBatch, batch: PackedBatch) -> None:
    """Two batches, bit for bit."""
    assert torch.equal(found.rows.buffer, batch.rows.buffer) and found.rows.spans == batch.rows.spans
    _assert_same_plan(found.plans.layers, batch.plans.layers)
    _assert_same_plan(found.plans.vit, batch.plans.vit)
    assert found.patches is not None and batch.patches is not None and torch.equal(found.patches, batch.patches)
    assert len(found.pixels) == len(batch.pixels) and all(map(torch.equal, found.pixels, batch.pixels))
    assert np.array_equal(found.layout.token_K, batch.layout.token_K) and found.layout.num_und == batch.layout.num_und
    for name in ("kind_S", "position_S", "ce_S", "sample_S", "fill_S", "noised_S"):
        assert np.array_equal(getattr(found.pack, name), getattr(batch.pack, name))
    assert [(s.key, s.items, s.latents) for s in found.pack.samples] == [
        (s.key, s.items, s.latents) for s in batch.pack.samples
    ]


def _assert_same_plan(found: Any, plan: Any) -> None:
    """Two plans of `worker_tasks.plan_codes`, or none."""
    assert (found is None) == (plan is None)
    if plan is not None:
        (mine, head_dim), (theirs, expected) = found, plan
        assert head_dim == expected and all(map(np.array_equal, vars(mine).values(), vars(theirs).values()))

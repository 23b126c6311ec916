"""The official batch of a case as our plans, packs and content.

Content (word ids, patches, latents, timesteps, noise) comes from the case. Who sees whom, RoPE positions, rows with a
loss and the order of rows come from our own sequence code, planned from the samples that were packed.

Shape letters: docs/notation.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabagel.config.schema import ModelConfig
from megabagel.errors import UserError
from megabagel.parallel.inputs import FixedNoise
from megabagel.parity.case import Case
from megabagel.sequence.batch import BatchBuilder, PackedBatch
from megabagel.sequence.items import Clip, Item, Latent, Mode, Text, Vit
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import Pack, build_pack
from megabagel.sequence.patches import patchify
from megabagel.sequence.rank_rows import LatentWeights
from megabagel.sequence.sample import LATENT, TEXT, VIT, LatentImage, SamplePlan, Segment, lay_out

DROPOUT = {Text: "text", Vit: "vit", Latent: "vae"}
"""Kinds of items in the official words for dropout."""


@dataclass(frozen=True)
class OfficialBatch:
    """A packed batch of a case, and its content by the names of the official code."""

    pack: Pack
    tensors: dict[str, Tensor]

    def get(self, name: str) -> Tensor:
        """One tensor of the batch; empty where the batch has no such tokens."""
        return self.tensors.get(name, torch.zeros(0, dtype=torch.int64))


def official_batch(case: Case, model: ModelConfig) -> OfficialBatch:
    """Plan the case's samples anew and take the timesteps of its batch.

    Raises UserError when the batch holds other content than the plan has tokens for.
    """
    tensors = case.tensors("batch")
    if "samples" in case.about:
        plans = _plans_of_samples(case, model)
    else:
        plans = list(_plans_of_batch(case.name, tensors, model))
    _check_content(case, plans, tensors, model)
    return OfficialBatch(build_pack(list(_with_timesteps(plans, tensors))), tensors)


def _check_content(case: Case, plans: Sequence[SamplePlan], tensors: dict[str, Tensor], model: ModelConfig) -> None:
    words, patches, latents = (sum(int((p.kind_S == kind).sum()) for p in plans) for kind in (TEXT, VIT, LATENT))
    expected = {"packed_text_ids": words, "packed_vit_tokens": patches, "packed_timesteps": latents, "noise": latents}
    expected["padded_latent"] = sum(len(plan.latents) for plan in plans)
    for name, rows in expected.items():
        found = len(tensors[name]) if name in tensors else 0
        if found != rows:
            raise UserError(
                f"{case.path}: batch/{name} has {found} rows, but its samples make {rows}; copy both files of the case "
                "again"
            )
    highest = int(tensors["packed_text_ids"].max())
    if highest >= model.vocab:
        raise UserError(
            f"{case.path}: batch/packed_text_ids holds {highest}, but the config's vocab_size is {model.vocab}; copy "
            "both files of the case again"
        )


def _with_timesteps(plans: Sequence[SamplePlan], tensors: dict[str, Tensor]) -> Iterator[SamplePlan]:
    at = 0
    for plan in plans:
        images = []
        for image in plan.latents:
            images.append(replace(image, raw_timestep=float(tensors["packed_timesteps"][at])))
            at += image.rows * image.cols
        yield replace(plan, latents=images)


def _plans_of_samples(case: Case, model: ModelConfig) -> list[SamplePlan]:
    """Plans by our own rules, without what the official draws dropped."""
    draws = iter(case.about.get("dropout_draws", ()))
    plans = []
    for number, sample in enumerate(case.about["samples"]):
        items = list(_items(sample, model))
        dropped = {index for index, item in enumerate(items) if _is_dropped(item, draws, case.entry("dropout"))}
        plans.append(lay_out(items, SampleKey(0, case.name, number, 0), dropped))
    return plans


def _is_dropped(item: Item, draws: Iterator[float], probabilities: dict[str, float]) -> bool:
    """One draw for each droppable item, and for each frame of a clip."""
    frames = item.frames if isinstance(item, Clip) else (item,)
    taken = [next(draws) < probabilities[DROPOUT[type(frame)]] for frame in frames if frame.droppable]
    return any(taken)


def _items(sample: dict[str, Any], model: ModelConfig) -> Iterator[Item]:
    """Our items for an official sequence plan. Each use of an image has an x_0 of its own, hence its own slot."""
    lengths, shapes = map(len, sample["text_ids_list"]), iter(sample["image_shapes"])
    frames: list[tuple[Latent, int | None]] = []
    for slot, entry in enumerate(sample["sequence_plan"]):
        loss, droppable = bool(entry["loss"]), bool(entry["enable_cfg"])
        if entry.get("special_token_loss"):
            raise UserError(f"{entry}: special_token_loss is not supported; no released dataset sets it")
        if entry["type"] == "text":
            yield Text(slot, next(lengths), loss, droppable)
            continue
        _, height, width = next(shapes)
        if entry["type"] == "vit_image":
            yield Vit(slot, height // model.vit.patch, width // model.vit.patch, droppable)
            continue
        image = Latent(slot, height // model.latent_stride, width // model.latent_stride, loss, droppable)
        if "split_start" not in entry:
            yield image
            continue
        frames.append((image, entry.get("frame_delta")))
        if entry["split_end"]:
            images, steps = zip(*frames, strict=True)
            yield Clip(images, steps)
            frames = []


def _plans_of_batch(name: str, tensors: dict[str, Tensor], model: ModelConfig) -> Iterator[SamplePlan]:
    """Plans read off a batch whose samples are not described: kinds, positions and segments as they are there."""
    total = int(tensors["sequence_length"])
    kind_S, ce_S = np.zeros(total, np.uint8), np.zeros(total, bool)
    for stream, kind in (("packed_vit_token_indexes", VIT), ("packed_vae_token_indexes", LATENT)):
        kind_S[tensors.get(stream, torch.zeros(0, dtype=torch.int64)).numpy()] = kind
    ce_S[tensors.get("ce_loss_indexes", torch.zeros(0, dtype=torch.int64)).numpy()] = True
    position_S = tensors["packed_position_ids"].numpy().astype(np.int32)
    segments = zip(tensors["split_lens"].tolist(), tensors["attn_modes"].tolist(), strict=True)
    vits, latents = iter(_vits(tensors, model)), iter(_latents(tensors))
    start = 0
    for number, length in enumerate(tensors["sample_lens"].tolist()[:-1]):  # the last one is padding
        rows = slice(start, start + length)
        plan = SamplePlan(
            SampleKey(0, name, number, 0), kind_S=kind_S[rows], position_S=position_S[rows], ce_S=ce_S[rows]
        )
        while sum(segment.length for segment in plan.segments) < length:
            size, mode = next(segments)
            plan.segments.append(Segment(Mode(mode), size))
        _take(plan.vits, vits, int((plan.kind_S == VIT).sum()))
        _take(plan.latents, latents, int((plan.kind_S == LATENT).sum()))
        yield plan
        start += length


def _take(into: list[Any], images: Iterator[Any], tokens: int) -> None:
    while tokens > 0:
        image = next(images)
        into.append(image)
        tokens -= image.rows * image.cols


def _vits(tensors: dict[str, Tensor], model: ModelConfig) -> Iterator[Vit]:
    sizes = tensors.get("vit_token_seqlens", torch.zeros(0, dtype=torch.int64)).tolist()
    ids_P = tensors.get("packed_vit_position_ids", torch.zeros(0, dtype=torch.int64))
    for slot, ids in enumerate(ids_P.split(sizes) if sizes else ()):
        yield Vit(slot, len((ids // model.vit.grid).unique()), len((ids % model.vit.grid).unique()))


def _latents(tensors: dict[str, Tensor]) -> Iterator[LatentImage]:
    shapes = tensors.get("patchified_vae_latent_shapes", torch.zeros(0, 2, dtype=torch.int64)).tolist()
    for slot, (rows, cols) in enumerate(shapes):
        yield LatentImage(slot, rows, cols, raw_timestep=0.0, noise_seed=0)  # both come from the case


def packed_batch(batch: OfficialBatch, batches: BatchBuilder, weights: LatentWeights | None = None) -> PackedBatch:
    """The batch as the data side would hand it to this rank. Latents come by `fixed_noise`, so there are no pixels.

    `weights`: of the latent tokens, for cases with rewards.
    """
    rank = batches.lay_out(batch.pack)
    patches = batch.get("packed_vit_tokens").split(rank.vit.sizes) if rank.vit.sizes else ()
    mine = [patches[number] for number in rank.vit.dealt[rank.place.cp]] if rank.place.first else []
    return batches.build(rank, batch.get("packed_text_ids").numpy(), mine, pixels=[], latent_weights=weights)


def fixed_noise(batch: OfficialBatch, model: ModelConfig) -> FixedNoise:
    """x_0 and noise of the case, per latent token. The stored latents are padded, with junk, to the largest image."""
    none_LZ = torch.zeros(0, model.latent_dim)
    if not batch.pack.latents:
        return FixedNoise(none_LZ, none_LZ)
    second = batch.tensors.get("padded_latent_gt")
    constraint_LZ = None if second is None else _tokens(batch, second, model)
    return FixedNoise(_tokens(batch, batch.tensors["padded_latent"], model), batch.tensors["noise"], constraint_LZ)


def _tokens(batch: OfficialBatch, latents: Tensor, model: ModelConfig) -> Tensor:
    """[L, Z] tokens of padded latents, one per image."""
    patch = model.latent_patch
    return torch.cat([
        patchify(latent[:, : image.rows * patch, : image.cols * patch], patch)
        for image, latent in zip(batch.pack.latents, latents, strict=True)
    ])  # fmt: skip


def words_S(batch: OfficialBatch) -> Tensor:
    """Word ids on their rows of the sequence, 0 elsewhere."""
    found_S = torch.zeros(batch.pack.tokens, dtype=torch.int64)
    found_S[torch.from_numpy(batch.pack.kind_S == TEXT)] = batch.get("packed_text_ids")
    return found_S

"""Plans and packs against batches that the official code made (golden cases; docs/bagel.md#samples, #rope, #mask)."""

from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import pytest
from megabagel_kernels.attention.mask import dense_mask
from torch import Tensor

from megabagel.data.tokenize.token_ids import Writer
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.items import Clip, Item, Latent, Mode, Text, Vit
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import Pack, build_pack, mask_codes
from megabagel.sequence.sample import LATENT, TEXT, VIT, Dropout, Segment, plan_sample

PATCH, LATENT_STRIDE = 14, 16
CASES = (
    "train_01_text_only",
    "train_02_t2i",
    "train_03_vlm",
    "train_04_edit",
    "train_05_interleave3",
    "train_06_video_groups",
)
MODES = {"causal": Mode.CAUSAL, "full": Mode.FULL, "noise": Mode.NOISE}


class Case(NamedTuple):
    """A golden batch, and ours of the same samples."""

    pack: Pack
    words: np.ndarray
    batch: dict[str, np.ndarray]
    allowed: np.ndarray
    config: dict


@pytest.fixture(params=CASES)
def case(request, golden) -> Case:
    tensors, about = golden(request.param)
    assert not any(about["dropout"].values())
    samples = [items_of(sample) for sample in about["samples"]]
    plans = [plan_sample(items, SampleKey(0, "golden", i, 0), Dropout()) for i, items in enumerate(samples)]
    return Case(
        pack=build_pack(plans),
        words=words_of(samples, about),
        batch={name[len("batch/") :]: array(x) for name, x in tensors.items() if name.startswith("batch/")},
        allowed=tensors["expect/attn_allowed"].numpy().astype(bool),
        config=about["config"],
    )


def array(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def items_of(sample: dict) -> list[Item]:
    """Our items of a golden sample. Slots count its texts and its images."""
    texts, shapes = enumerate(sample["text_ids_list"]), enumerate(sample["image_shapes"])
    items: list[Item] = []
    frames: list[tuple[Latent, int | None]] = []
    for entry in sample["sequence_plan"]:
        droppable = bool(entry["enable_cfg"])
        if entry["type"] == "text":
            slot, ids = next(texts)
            items.append(Text(slot, len(ids), bool(entry["loss"]), droppable))
            continue
        slot, (_, height, width) = next(shapes)
        if entry["type"] == "vit_image":
            items.append(Vit(slot, height // PATCH, width // PATCH, droppable))
            continue
        image = Latent(slot, height // LATENT_STRIDE, width // LATENT_STRIDE, bool(entry["loss"]), droppable)
        if "split_start" not in entry:
            items.append(image)
            continue
        frames.append((image, entry.get("frame_delta")))
        if entry["split_end"]:
            items.append(Clip(*zip(*frames, strict=True)))
            frames = []
    return items


def words_of(samples: list[list[Item]], about: dict) -> np.ndarray:
    """Word ids of the TEXT tokens, as the data side writes them."""
    tokens = about["special_tokens"]
    names = {
        "<|im_start|>": tokens["bos_token_id"],
        "<|im_end|>": tokens["eos_token_id"],
        "<|vision_start|>": tokens["start_of_image"],
        "<|vision_end|>": tokens["end_of_image"],
    }
    writer = Writer(type("Tokens", (), {"token_id": lambda _, name: names[name]})())
    texts = [sample["text_ids_list"] for sample in about["samples"]]
    return np.array(
        [w for items, ids in zip(samples, texts, strict=True) for w in writer.words(items, ids.__getitem__)]
    )


def rows(flags: np.ndarray) -> list[int]:
    return np.flatnonzero(flags).tolist()


def test_samples_and_splits(case):
    pack, batch = case.pack, case.batch
    assert pack.tokens == batch["sequence_length"]
    assert [sample.tokens for sample in pack.samples] == batch["sample_lens"][:-1].tolist()  # the last one is padding
    segments = [segment for sample in pack.samples for segment in sample.segments]
    assert [segment.length for segment in segments] == batch["split_lens"][:-1].tolist()
    assert [int(segment.mode) for segment in segments] == batch["attn_modes"][:-1].tolist()


def test_rope_ids(case):
    assert case.pack.position_S.tolist() == case.batch["packed_position_ids"].tolist()


def test_mask(case):
    assert np.array_equal(dense_mask(case.pack.codes), case.allowed)


def test_words_and_labels(case):
    pack, batch = case.pack, case.batch
    assert rows(pack.kind_S == TEXT) == batch["packed_text_indexes"].tolist()
    assert case.words[pack.fill_S[pack.kind_S == TEXT]].tolist() == batch["packed_text_ids"].tolist()
    assert rows(pack.ce_S) == batch.get("ce_loss_indexes", np.zeros(0)).tolist()
    assert case.words[pack.fill_S[pack.ce_S] + 1].tolist() == batch.get("packed_label_ids", np.zeros(0)).tolist()


def test_vit_patches(case):
    pack, batch = case.pack, case.batch
    images = [image for sample in pack.samples for image in sample.vits]
    assert rows(pack.kind_S == VIT) == batch.get("packed_vit_token_indexes", np.zeros(0)).tolist()
    assert [image.rows * image.cols for image in images] == batch.get("vit_token_seqlens", np.zeros(0)).tolist()
    side = case.config["vit_max_num_patch_per_side"]
    ids = [grid_ids(image.rows, image.cols, side, case.config["interpolate_pos"]).tolist() for image in images]
    assert list(chain(*ids)) == batch.get("packed_vit_position_ids", np.zeros(0)).tolist()


def test_latents(case):
    pack, batch = case.pack, case.batch
    assert rows(pack.kind_S == LATENT) == batch.get("packed_vae_token_indexes", np.zeros(0)).tolist()
    assert rows(pack.noised_S) == batch.get("mse_loss_indexes", np.zeros(0)).tolist()
    grids = [[image.rows, image.cols] for image in pack.latents]
    assert grids == batch.get("patchified_vae_latent_shapes", np.zeros((0, 2))).tolist()
    side = case.config["max_latent_size"]
    ids = [grid_ids(image.rows, image.cols, side, case.config["interpolate_pos"]).tolist() for image in pack.latents]
    assert list(chain(*ids)) == batch.get("packed_latent_position_ids", np.zeros(0)).tolist()


def test_timesteps_are_shared_where_the_official_ones_are(case):
    """The draws themselves differ; which tokens are clean and which share a draw does not."""
    ours = np.repeat([i.raw_timestep for i in case.pack.latents], [i.rows * i.cols for i in case.pack.latents])
    theirs = case.batch.get("packed_timesteps", np.zeros(0))
    assert np.isneginf(ours).tolist() == np.isneginf(theirs).tolist()
    assert [len(list(run)) for _, run in groupby(ours)] == [len(list(run)) for _, run in groupby(theirs)]


def test_random_masks_of_the_official_builder(golden):
    tensors, about = golden("prim_01_building_blocks")
    assert len(about["masks"]) >= 10
    for number, layout in enumerate(about["masks"]):
        segments = iter(Segment(MODES[m], n) for m, n in zip(layout["attn_modes"], layout["split_lens"], strict=True))
        samples = []
        for length in layout["sample_lens"]:
            sample: list[Segment] = []
            while sum(segment.length for segment in sample) < length:
                sample.append(next(segments))
            samples.append(sample)
        mask = np.asarray(dense_mask(mask_codes(samples)))
        assert mask.tolist() == tensors[f"mask/{number}"].bool().tolist()
        assert mask.sum() == layout["allowed_pairs"]

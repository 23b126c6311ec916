"""RoPE ids, losses and conditioning dropout of one sample (docs/bagel.md#rope, #flow-time)."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabagel.sequence.items import Clip, Item, Latent, Text, Vit, item_tokens
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.sample import LATENT, TEXT, VIT, Dropout, LatentImage, SamplePlan, plan_sample
from tests.support.oracle import clip_mode, tokens_of
from tests.support.strategies import examples, sample_items

KEY = SampleKey(seed=11, source="pairs", sample=5, epoch=2)
KIND = {"word": TEXT, "patch": VIT, "latent": LATENT}
PROBABILITY = st.sampled_from([0.0, 0.3, 0.6, 1.0])


def plan(*items: Item) -> SamplePlan:
    """The plan of a sample from which nothing is dropped."""
    return plan_sample(list(items), KEY, Dropout())


def ids(plan: SamplePlan) -> list[tuple[int, int]]:
    """RoPE ids as (id, how many tokens in a row)."""
    return [(int(position), len(list(run))) for position, run in groupby(plan.position_S)]


def draws(plan: SamplePlan) -> dict[tuple[int, bool], tuple[float, int]]:
    """(timestep, noise seed) by image."""
    return {(image.slot, image.noised): (image.raw_timestep, image.noise_seed) for image in plan.latents}


def left_out(items: list[Item], plan: SamplePlan) -> set[int]:
    """Numbers of the items that the plan lacks."""
    return {number for number, item in enumerate(items) if item not in plan.items}


# RoPE ids, row by row of the table of docs/bagel.md#rope

TEXT_BEFORE, TEXT_AFTER = Text(90, 1), Text(91, 0)  # ids 0 to 2; the last one shows where the counter is
IMAGE_ROWS = [
    ([Text(0, 2)], [3, 4, 5, 6], 7),
    ([Vit(0, 1, 2)], [3] * 4, 4),
    ([Latent(0, 2, 1, noised=False)], [3] * 4, 4),
    ([Latent(0, 2, 1, noised=True)], [3] * 4, 3),
    ([Latent(0, 1, 1, noised=True), Latent(0, 1, 1, noised=False), Vit(0, 1, 1)], [3] * 6 + [4] * 3, 5),
]
FRAME = {noised: Latent(0, 1, 1, noised) for noised in (False, True)}
CLIP_ROWS = [
    ([Clip((FRAME[False],) * 2, (None, None))], [3] * 3 + [4] * 3, 5),
    ([Clip((FRAME[True],) * 2, (None, None))], [3] * 6, 3),
    ([Clip((FRAME[False],) * 3, (4, 2, None))], [3] * 3 + [7] * 3 + [9] * 3, 10),
    ([Clip((FRAME[True],) * 3, (4, 2, None))], [3] * 3 + [7] * 3 + [9] * 3, 9),
    ([Clip((FRAME[True],), (5,), chain=0), Clip((FRAME[True],), (None,), chain=0)], [3] * 3 + [8] * 3, 8),
]


@pytest.mark.parametrize(("items", "expected", "after"), IMAGE_ROWS + CLIP_ROWS)
def test_rope_ids(items, expected, after):
    assert plan(TEXT_BEFORE, *items, TEXT_AFTER).position_S.tolist() == [0, 1, 2, *expected, after, after + 1]


@pytest.mark.parametrize(
    ("dropped", "moves"),
    [
        (Text(0, 4, droppable=True), 0),
        (Vit(0, 2, 3, droppable=True), 1),
        (Latent(0, 2, 3, noised=False, droppable=True), 1),
        (Clip((Latent(0, 1, 2, noised=False, droppable=True),) * 2, (3, None)), 1),
    ],
)
def test_a_dropped_image_leaves_a_gap_unless_told_otherwise(dropped, moves):
    items, all_dropped = [TEXT_BEFORE, dropped, TEXT_AFTER], Dropout(1.0, 1.0, 1.0)
    kept = [0, 1, 2]
    assert plan_sample(items, KEY, all_dropped).position_S.tolist() == [*kept, 3 + moves, 4 + moves]
    assert plan_sample(items, KEY, all_dropped, advance_dropped=False).position_S.tolist() == [*kept, 3, 4]
    assert plan_sample(items, KEY, all_dropped).items == [TEXT_BEFORE, TEXT_AFTER]


# Losses


def test_cross_entropy_rows_are_those_before_each_id_and_before_eos():
    told, asked = Text(0, 3, loss=True), Text(1, 2)
    sample = plan(asked, told, Latent(2, 1, 2, noised=True), Text(3, 0, loss=True), Vit(4, 1, 1))
    assert sample.ce_S.tolist() == [
        *(0, 0, 0, 0),  # bos ids eos
        *(1, 1, 1, 1, 0),  # bos ids eos, with loss
        *(0, 0, 0, 0),  # soi latents eoi
        *(1, 0),  # bos eos, with loss
        *(0, 0, 0),  # soi patch eoi
    ]


@examples(300)
@given(sample_items(), PROBABILITY, PROBABILITY, PROBABILITY, st.booleans())
def test_every_token_is_as_the_definition_says(items, text, vit, latent, advance_dropped):
    sample = plan_sample(items, KEY, Dropout(text, vit, latent), advance_dropped)
    tokens = tokens_of(items, left_out(items, sample), advance_dropped)
    assert sample.kind_S.tolist() == [KIND[token.kind] for token in tokens]
    assert sample.position_S.tolist() == [token.position for token in tokens]
    assert sample.ce_S.tolist() == [bool(token.label) for token in tokens]
    assert sample.tokens == len(tokens) == sum(segment.length for segment in sample.segments)
    runs = [list(run) for _, run in groupby(tokens, key=lambda token: token.segment)]
    assert [(s.mode, s.length, s.chain) for s in sample.segments] == [(r[0].mode, len(r), r[0].chain) for r in runs]
    dtypes = (sample.kind_S.dtype, sample.position_S.dtype, sample.ce_S.dtype)
    assert dtypes == (np.uint8, np.int32, bool)


@examples(100)
@given(sample_items())
def test_images_are_listed_in_token_order(items):
    sample = plan(*items)
    for kind, images in (("patch", sample.vits), ("latent", sample.latents)):
        places = [token.image for token in tokens_of(items) if token.kind == kind]
        assert [(i.slot, p) for i in images for p in range(i.rows * i.cols)] == places
    flow = [token.flow for token in tokens_of(items) if token.kind == "latent"]
    assert [i.noised for i in sample.latents for _ in range(i.rows * i.cols)] == flow


@examples(100)
@given(sample_items())
def test_items_know_their_size_and_clips_their_mode(items):
    for item in items:
        assert item_tokens(item) == len(tokens_of([item]))
        assert not isinstance(item, Clip) or item.mode == clip_mode(item)


def test_a_sample_may_be_dropped_as_a_whole():
    sample = plan_sample([Text(0, 3, droppable=True)], KEY, Dropout(text=1.0))
    assert (sample.tokens, sample.items, sample.segments) == (0, [], [])


# Timesteps and noise


def test_clean_images_have_no_noise_level_and_frames_of_a_clip_share_one():
    frames = tuple(Latent(slot, 1, 1, noised=True) for slot in (1, 2, 3))
    group = Clip(frames[:2], (1, 1), chain=0)
    sample = plan(Latent(0, 1, 1, noised=False), group, Clip(frames[2:], (1,), chain=0), Latent(4, 1, 1, noised=True))
    clean, first, second, third, single = (image.raw_timestep for image in sample.latents)
    assert clean == -np.inf
    assert first == second
    assert np.isfinite([first, third, single]).all() and len({first, third, single}) == 3
    assert len({image.noise_seed for image in sample.latents}) == 5  # noise itself is never shared


def test_timesteps_are_standard_normal_and_independent():
    def levels(number: int) -> list[float]:
        items: list[Item] = [Latent(slot, 1, 1, noised=True) for slot in (0, 1)]
        return [image.raw_timestep for image in plan_sample(items, SampleKey(1, "s", number, 0), Dropout()).latents]

    u_N2 = np.array([levels(number) for number in range(2000)])
    assert np.abs(u_N2.mean(0)).max() < 4 / np.sqrt(2000)
    assert np.abs(u_N2.std(0) - 1).max() < 4 / np.sqrt(2 * 2000)
    assert abs(np.corrcoef(u_N2.T)[0, 1]) < 4 / np.sqrt(2000)
    assert np.mean(np.abs(u_N2) < 0.6745) == pytest.approx(0.5, abs=0.03)  # quartiles of the normal law


# Conditioning dropout

DROPPABLE = [
    Text(0, 1, droppable=True),
    Vit(1, 1, 1, droppable=True),
    Latent(2, 1, 1, noised=False, droppable=True),
    Text(3, 1),
    Vit(4, 1, 1),
    Latent(5, 1, 1, noised=False),
    Latent(6, 1, 1, noised=True),
]


def test_each_kind_is_dropped_at_its_own_rate_and_independently():
    gone_NK = np.zeros((2000, len(DROPPABLE)), bool)
    for number, row in enumerate(gone_NK):
        sample = plan_sample(DROPPABLE, SampleKey(1, "s", number, 0), Dropout(0.1, 0.5, 0.3))
        row[list(left_out(DROPPABLE, sample))] = True
    assert gone_NK.mean(0) == pytest.approx([0.1, 0.5, 0.3, 0, 0, 0, 0], abs=0.04)
    assert np.abs(np.corrcoef(gone_NK[:, :3].T) - np.eye(3)).max() < 4 / np.sqrt(2000)


@examples(200)
@given(sample_items(), PROBABILITY, PROBABILITY, PROBABILITY)
def test_nothing_that_is_dropped_changes_another_draw(items, text, vit, latent):
    def gone(dropout: Dropout) -> set[int]:
        return left_out(items, plan_sample(items, KEY, dropout))

    everything, some = draws(plan(*items)), draws(plan_sample(items, KEY, Dropout(text, vit, latent)))
    assert some.items() <= everything.items()
    alone = gone(Dropout(text=text)) | gone(Dropout(vit=vit)) | gone(Dropout(latent=latent))
    assert gone(Dropout(text, vit, latent)) == alone
    assert gone(Dropout(text / 2, vit / 2, latent / 2)) <= alone  # a higher rate only adds to what is dropped


@examples(100)
@given(sample_items(), st.integers(0, 2**32), st.integers(0, 10**6), st.integers(0, 9))
def test_draws_belong_to_the_visit(items, seed, number, epoch):
    key = SampleKey(seed, "pairs", number, epoch)
    others = [
        SampleKey(seed + 1, "pairs", number, epoch),
        SampleKey(seed, "others", number, epoch),
        SampleKey(seed, "pairs", number + 1, epoch),
        SampleKey(seed, "pairs", number, epoch + 1),
    ]
    mine = draws(plan_sample(items, key, Dropout()))
    assert mine == draws(plan_sample(items, key, Dropout()))
    for other in others:
        theirs = draws(plan_sample(items, other, Dropout()))
        assert all(theirs[image][1] != noise for image, (_, noise) in mine.items())
        assert all(theirs[image][0] != level for image, (level, _) in mine.items() if level != -np.inf)


def test_a_latent_image_is_noised_unless_its_level_is_minus_infinity():
    assert LatentImage(0, 1, 1, raw_timestep=-8.0, noise_seed=0).noised
    assert not LatentImage(0, 1, 1, raw_timestep=-np.inf, noise_seed=0).noised

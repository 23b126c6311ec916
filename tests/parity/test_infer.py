"""Generation against the official code: every visible case on one rank and on grids, and planted errors."""

import pytest

from tests.parity import infer_plants as plants
from tests.support.parity_command import INFERENCE, Plant, parity, paths
from tests.support.parity_files import at_hand, needs
from tests.support.rank_pool import RankPool

RENORM, SIZES, KV, TAYLOR = (
    f"infer_{n}" for n in ("03_renorm", "05_schedule_and_sizes", "09_kv_cache", "12_taylorseer")
)
SAMPLED = "infer_14_sampled_text"


def passes(ranks: RankPool, size: int, words: list[str]) -> None:
    outcomes = ranks.run(size, parity, words)
    assert outcomes[0].failed == []
    assert {(outcome.code, outcome.err) for outcome in outcomes} == {(0, "")}


def test_every_case_on_one_rank(ranks: RankPool) -> None:
    passes(ranks, 1, paths(*at_hand(*INFERENCE)))


@needs(RENORM, KV, TAYLOR, SAMPLED)
@pytest.mark.parametrize("axis", ["tp", "pp", "cp"])
def test_two_ranks(ranks: RankPool, axis: str) -> None:
    """Pictures with three branches, the cache of every layer, extrapolated features on the last stage, texts."""
    passes(ranks, 2, [*paths(RENORM, KV, TAYLOR, SAMPLED), f"parallel.{axis}=2"])


@pytest.mark.thorough
@pytest.mark.parametrize("axis", ["tp", "pp", "cp"])
def test_every_case_on_two_ranks(ranks: RankPool, axis: str) -> None:
    passes(ranks, 2, [*paths(*at_hand(*INFERENCE)), f"parallel.{axis}=2"])


EIGHT = ["parallel.tp=2", "parallel.pp=2", "parallel.cp=2"]


@pytest.mark.slow
@needs(RENORM)
def test_eight_ranks(ranks: RankPool) -> None:
    """One case of pictures: eight ranks on two cores spend their time in exchanges, 30 s for a case."""
    passes(ranks, 8, [*paths(RENORM), *EIGHT])


@pytest.mark.thorough
@pytest.mark.parametrize("case", INFERENCE)
def test_every_case_on_eight_ranks(ranks: RankPool, case: str) -> None:
    passes(ranks, 8, [*paths(case), *EIGHT])


@pytest.mark.parametrize(
    ("plant", "case", "row"),
    [
        (plants.interval_includes_its_start, SIZES, "t2i/img0 scales"),
        (plants.text_channel_after_the_images, RENORM, "edit/img0.expect.v_t"),
        (plants.channel_before_the_images, RENORM, "edit/img2.expect.v_t"),
        (plants.global_norm_per_token, RENORM, "edit/img4.expect.v_t"),
        (plants.renormed_upwards, RENORM, "edit/img8.expect.v_t"),
        (plants.image_positions_count_up, KV, "mixed/op1.k0"),
        (plants.images_are_causal, KV, "mixed/op1.k2"),
        (plants.ends_of_images_by_the_generation_expert, KV, "mixed/op1.v0"),
        (plants.clean_latents_at_one, KV, "mixed/op1.k0"),
        (plants.text_free_at_the_position_of_main, RENORM, "edit/img0.expect.v_text"),
        (plants.text_starts_one_later, SAMPLED, "t03/txt0.expect.logits"),
        (plants.taylorseer_every_fourth, TAYLOR, "t2i/img0.expect.v_main"),
        (plants.norm_after_rotation, KV, "mixed/op0.k0"),
        (plants.latent_channels_first, KV, "mixed/op1.k0"),
        (plants.steps_not_shifted, KV, "mixed/img0 timesteps"),
        (plants.decoding_misses_the_last_token, SAMPLED, "t03/txt0.expect.logits"),
    ],
)
def test_caught(ranks: RankPool, plant: Plant, case: str, row: str) -> None:
    (outcome,) = ranks.run(1, parity, paths(case), plant)
    assert outcome.code == 1, outcome.err
    assert row in outcome.failed


def test_a_planted_error_spares_what_it_cannot_touch(ranks: RankPool) -> None:
    """Rows that fail say where to look: a wrong extrapolation leaves the picture without TaylorSeer alone."""
    (outcome,) = ranks.run(1, parity, paths(TAYLOR), plants.taylorseer_every_fourth)
    assert not [row for row in outcome.failed if not row.startswith("t2i/img0")]

"""Errors planted in the program: `megabagel parity` must catch each, in a row that says where to look."""

import pytest

from tests.support import seeded_bugs
from tests.support.parity_command import DP2, EDIT, PRIM, TEXT_ONLY, Plant, parity, paths
from tests.support.parity_files import needs
from tests.support.rank_pool import RankPool

INTERLEAVED = "train_05_interleave3"


@pytest.mark.parametrize(
    "plant, case, row",
    [
        (seeded_bugs.experts_swapped, EDIT, "expect/ce"),
        (seeded_bugs.vit_patches_transposed, EDIT, "expect/ce"),
        (seeded_bugs.patchify_transposed, PRIM[0], "patchify/tokens"),
        (seeded_bugs.table_transposed, EDIT, "expect/ce"),
        (seeded_bugs.table_transposed, PRIM[0], "sincos/dim3584_side70_rows"),
        (seeded_bugs.rope_interleaved, EDIT, "expect/ce"),
        (seeded_bugs.rope_interleaved, PRIM[0], "rope/q_out_pos7_100"),
        (seeded_bugs.shift_ignored, EDIT, "expect/inputs_embeds"),
        (seeded_bugs.target_reversed, EDIT, "expect/mse"),
        (seeded_bugs.noised_image_seen, INTERLEAVED, "batch/attn_modes"),
        (seeded_bugs.clean_copy_moved_on, INTERLEAVED, "batch/packed_position_ids"),
        (seeded_bugs.k_norm_missing, EDIT, "expect/ce"),
        (seeded_bugs.k_norm_missing, TEXT_ONLY, "expect/ce"),
        (seeded_bugs.rope_interleaved, TEXT_ONLY, "grad/language_model.model.layers.0.self_attn.q_proj.weight"),
        (seeded_bugs.averages_before_the_step, DP2, "expect_ema/connector.fc1.bias"),
        (seeded_bugs.adam_eps_as_usual, DP2, "update_norms_f64 (163) time_embedder.mlp.0.weight"),
        (seeded_bugs.rate_a_step_late, DP2, "step 2: lr"),
    ],
)
def test_caught(ranks: RankPool, plant: Plant, case: str, row: str) -> None:
    outcome = ranks.run(1, parity, paths(case), plant)[0]
    assert outcome.code == 1, outcome.err
    assert row in outcome.failed


@needs(EDIT)
@pytest.mark.parametrize(
    "plant, axis, row",
    [
        (seeded_bugs.ce_over_own_rows, "cp", "grad/connector.fc1.weight"),
        (seeded_bugs.tp_sums_missing, "tp", "grad/language_model.model.layers.0.input_layernorm.weight"),
    ],
)
def test_caught_on_two_ranks(ranks: RankPool, plant: Plant, axis: str, row: str) -> None:
    """Errors that one rank alone cannot make."""
    assert ranks.run(1, parity, paths(EDIT), plant)[0].code == 0
    outcomes = ranks.run(2, parity, [*paths(EDIT), f"parallel.{axis}=2"], plant)
    assert {outcome.code for outcome in outcomes} == {1}
    assert row in outcomes[0].failed

"""Errors planted in the program: `megabagel parity` must catch each, in a row that says where to look."""

import pytest

from tests.parallel.pool import RankPool
from tests.parity import plants
from tests.parity.command import DP2, PRIM, Plant, needs_cases, parity, paths

pytestmark = needs_cases

EDIT, INTERLEAVED = "train_04_edit", "train_05_interleave3"


@pytest.mark.parametrize(
    "plant, case, row",
    [
        (plants.experts_swapped, EDIT, "expect/ce"),
        (plants.vit_patches_transposed, EDIT, "expect/ce"),
        (plants.patchify_transposed, PRIM[0], "patchify/tokens"),
        (plants.table_transposed, EDIT, "expect/ce"),
        (plants.table_transposed, PRIM[0], "sincos/dim3584_side70_rows"),
        (plants.rope_interleaved, EDIT, "expect/ce"),
        (plants.rope_interleaved, PRIM[0], "rope/q_out_pos7_100"),
        (plants.shift_ignored, EDIT, "expect/inputs_embeds"),
        (plants.target_reversed, EDIT, "expect/mse"),
        (plants.noised_image_seen, INTERLEAVED, "batch/attn_modes"),
        (plants.clean_copy_moved_on, INTERLEAVED, "batch/packed_position_ids"),
        (plants.k_norm_missing, EDIT, "expect/ce"),
        (plants.averages_before_the_step, DP2, "expect_ema/connector.fc1.bias"),
        (plants.adam_eps_as_usual, DP2, "update_norms_f64 (163) time_embedder.mlp.0.weight"),
        (plants.rate_a_step_late, DP2, "step 2: lr"),
    ],
)
def test_caught(ranks: RankPool, plant: Plant, case: str, row: str) -> None:
    outcome = ranks.run(1, parity, paths(case), plant)[0]
    assert outcome.code == 1, outcome.err
    assert row in outcome.failed


@pytest.mark.parametrize(
    "plant, axis, row",
    [
        (plants.ce_over_own_rows, "cp", "grad/connector.fc1.weight"),
        (plants.tp_sums_missing, "tp", "grad/language_model.model.layers.0.input_layernorm.weight"),
    ],
)
def test_caught_on_two_ranks(ranks: RankPool, plant: Plant, axis: str, row: str) -> None:
    """Errors that one rank alone cannot make."""
    assert ranks.run(1, parity, paths(EDIT), plant)[0].code == 0
    outcomes = ranks.run(2, parity, [*paths(EDIT), f"parallel.{axis}=2"], plant)
    assert {outcome.code for outcome in outcomes} == {1}
    assert row in outcomes[0].failed

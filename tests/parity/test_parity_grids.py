"""The golden cases on grids of ranks, at three times the gates of one rank."""

import json
from pathlib import Path

import pytest

from tests.support.parity_command import (
    ACCUMULATED,
    ACCUMULATED_GLOBAL,
    DP2,
    EDIT,
    MICRO_STEP,
    TRAIN_AT_HAND,
    parity,
    paths,
)
from tests.support.parity_files import at_hand, needs
from tests.support.rank_pool import RankPool


def passes(ranks: RankPool, size: int, words: list[str]) -> None:
    outcomes = ranks.run(size, parity, words)
    assert outcomes[0].failed == []
    assert {(outcome.code, outcome.err) for outcome in outcomes} == {(0, "")}
    assert not any(outcome.out for outcome in outcomes[1:]), "rank 0 alone prints"


@pytest.mark.parametrize("axis", ["tp", "pp", "cp"])
def test_two_ranks_of_one_replica(ranks: RankPool, axis: str) -> None:
    passes(ranks, 2, [*paths(*TRAIN_AT_HAND, *at_hand(DP2)), f"parallel.{axis}=2"])


@pytest.mark.slow
def test_eight_ranks(ranks: RankPool) -> None:
    passes(
        ranks,
        8,
        [*paths(*TRAIN_AT_HAND, *at_hand(DP2, ACCUMULATED_GLOBAL)), "parallel.tp=2", "parallel.pp=2", "parallel.cp=2"],
    )


@needs(ACCUMULATED)
def test_accumulation_by_the_released_rule_on_a_grid(ranks: RankPool) -> None:
    passes(ranks, 2, [*paths(ACCUMULATED), MICRO_STEP, "parallel.cp=2"])


@needs(DP2, EDIT)
def test_two_replicas(ranks: RankPool) -> None:
    """The batch of a training case on each; a trace's two, one each: then both normalisations are the same."""
    passes(ranks, 2, paths(DP2, EDIT))
    passes(ranks, 2, [*paths(DP2), MICRO_STEP])


@needs("train_05_interleave3", DP2)
def test_virtual_stages_without_row_splitting(ranks: RankPool) -> None:
    passes(ranks, 2, [*paths("train_05_interleave3", DP2), "parallel.pp=2", "parallel.vpp=2"])
    passes(ranks, 2, [*paths("train_05_interleave3"), "parallel.tp=2", "parallel.sp=false"])


@needs("train_02_t2i")
def test_gates_of_a_grid_are_three_times_those_of_one_rank(ranks: RankPool, tmp_path: Path) -> None:
    """Replicas alone split no sum."""
    found = []
    for size, words in ((1, []), (2, []), (2, ["parallel.cp=2"])):
        file = tmp_path / f"{len(found)}.json"
        passes(ranks, size, [*paths("train_02_t2i"), *words, "--json", str(file)])
        rows = json.loads(file.read_text())["rows"]
        found.append({row["name"]: row["tolerance"] for row in rows})
    one, replicas, grid = found
    assert one["expect/mse"] == 5e-6 and one["grad/llm2vae.weight"] == 2e-5 and one["reduced mse"] == 5e-6
    assert replicas == one
    assert grid == {name: pytest.approx(3 * tolerance) for name, tolerance in one.items()}

"""Golden cases of SRUM on one rank and on grids; a planted error in any part of the weight fails one of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.parity_command import parity, paths
from tests.support.parity_files import needs, stem
from tests.support.rank_pool import RankPool

LOSSES = (
    "srum_03_one_image",
    "srum_04_posterior_noise",
    "srum_05_good_and_bad",
    "srum_07_without_map",
    "srum_09_lambda_zero",
)
PURE = ("srum_01_reward_maps", "srum_02_latent_tokens", "srum_12_judge_texts", "srum_13_activation")
PAIR, TRACE = "srum_05_good_and_bad", "srum_11_trace"


def passes(ranks: RankPool, size: int, *words: str) -> str:
    outcomes = ranks.run(size, parity, list(words))
    assert outcomes[0].failed == []
    assert {(outcome.code, outcome.err) for outcome in outcomes} == {(0, "")}
    return outcomes[0].out


@needs(*LOSSES, *PURE, TRACE)
def test_every_case_passes_on_one_rank(ranks: RankPool) -> None:
    out = passes(ranks, 1, *paths(*LOSSES, *PURE, TRACE))
    read = [line for line in out.splitlines() if "ours reads" in line or "ours refuses" in line or "ours keeps" in line]
    assert len(read) == 11, "what the released parser loses or takes wrongly"
    assert "regions/as_the_prompt_shows[2]: ours reads -0.3" in out
    absent = not stem("srum_06_three_in_a_pack").with_suffix(".safetensors").is_file()
    assert ("steps from 2 on did not run: srum_06_three_in_a_pack" in out) is absent


@needs(*LOSSES)
@pytest.mark.parametrize("axis", ["tp", "pp", "cp"])
def test_losses_on_two_ranks(ranks: RankPool, axis: str) -> None:
    passes(ranks, 2, *paths(*LOSSES), f"parallel.{axis}=2")


@needs(PAIR)
def test_two_replicas(ranks: RankPool) -> None:
    passes(ranks, 2, *paths(PAIR))


@needs(*LOSSES)
@pytest.mark.thorough
def test_losses_on_eight_ranks(ranks: RankPool) -> None:
    passes(ranks, 8, *paths(*LOSSES), "parallel.tp=2", "parallel.pp=2", "parallel.cp=2")


def one_target(patch: pytest.MonkeyPatch) -> None:
    from megabagel.parallel.inputs import InputBuilder

    right = InputBuilder._noised

    def noised(self: Any, *args: Any) -> Any:
        first, _ = right(self, *args)
        return first, first

    patch.setattr(InputBuilder, "_noised", noised)


def area_instead(patch: pytest.MonkeyPatch) -> None:
    from megabagel.parity import srum_case

    right = srum_case.pooled
    patch.setattr(srum_case, "pooled", lambda map_hw, grid, how: right(map_hw, grid, "area"))


def divided_by_weights(patch: pytest.MonkeyPatch) -> None:
    from megabagel.sequence.rank_rows import LatentWeights

    def init(self: Any, flow_L: Any, constraint_L: Any = None) -> None:
        object.__setattr__(self, "flow_L", flow_L / max(float(flow_L.mean()), 1e-6))
        object.__setattr__(self, "constraint_L", constraint_L)

    patch.setattr(LatentWeights, "__init__", init)


@needs(PAIR)
@pytest.mark.parametrize("plant", [one_target, area_instead, divided_by_weights])
def test_a_planted_error_fails(ranks: RankPool, plant: Callable[[pytest.MonkeyPatch], None]) -> None:
    outcome = ranks.run(1, parity, paths(PAIR), plant)[0]
    assert outcome.code == 1 and "loss" in outcome.failed


@needs(TRACE)
def test_a_trace_without_any_batch_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    for suffix in (".json", ".safetensors"):
        (tmp_path / f"{TRACE}{suffix}").write_bytes(stem(TRACE).with_suffix(suffix).read_bytes())
    outcome = ranks.run(1, parity, [str(tmp_path / TRACE)])[0]
    assert outcome.code == 2 and "none of the cases that its steps use lies beside it" in outcome.err

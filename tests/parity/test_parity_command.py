"""`megabagel parity` on one rank: what passes, what is written, and that a changed number fails."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.support.parity_command import (
    ACCUMULATED,
    ACCUMULATED_GLOBAL,
    DP2,
    DRAWING,
    EDIT,
    INFER,
    MICRO_STEP,
    PRIM,
    TEXT_ONLY,
    TRAIN_AT_HAND,
    About,
    Change,
    Entries,
    Outcome,
    changed,
    parity,
    paths,
    without_weights,
)
from tests.support.parity_files import at_hand, needs, stem
from tests.support.rank_pool import RankPool


def alone(ranks: RankPool, *words: str) -> Outcome:
    return ranks.run(1, parity, words)[0]


def rows_by_case(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in json.loads(file.read_text())["rows"]:
        found.setdefault(row["case"], {})[row["name"]] = row
    return found


def keys(name: str) -> set[str]:
    with safe_open(stem(name).with_suffix(".safetensors"), "pt") as file:
        return set(file.keys())


def test_every_case_passes_however_it_is_named(ranks: RankPool, tmp_path: Path) -> None:
    names = [*TRAIN_AT_HAND, *at_hand(*PRIM, DP2, ACCUMULATED_GLOBAL)]
    endings = ["", ".json", ".safetensors"]
    words = [word + endings[number % 3] for number, word in enumerate(paths(*names))]
    outcome = alone(ranks, *words, words[0] + ".json", "--json", str(tmp_path / "all.json"))
    assert (outcome.code, outcome.failed, outcome.err) == (0, [], "")
    content, rows = json.loads((tmp_path / "all.json").read_text()), rows_by_case(tmp_path / "all.json")
    assert content["verdict"] == "ok" and content["ranks"] == 1
    assert content["wall_seconds"] is content["cpu_seconds"] is None, "nothing was timed"
    assert list(rows) == names, "each once, in order"
    for case, found in rows.items():
        assert {row["verdict"] for row in found.values()} == {"ok"}
        for name, row in found.items():  # everything written is printed, and the other way round
            assert f"{row['max_abs']:9.2e}  {row['max_rel']:9.2e}  {row['rel_l2']:9.2e}" in outcome.out, name
        about = json.loads(stem(case).with_suffix(".json").read_text())
        noise = {f"grad/{name}" for name in about.get("grads_roundoff_only", ())}
        noise |= {
            f"{group}/{name}"
            for group in ("expect_param", "expect_ema")
            for name in about.get("update_is_roundoff_only", ())
        }
        expected = {key for key in keys(case) if key.startswith(("expect", "grad/", "vae/expect", "mask/", "posids/"))}
        assert expected - noise <= found.keys()


@needs(ACCUMULATED)
def test_accumulation_as_the_released_trainer_does_it(ranks: RankPool) -> None:
    assert alone(ranks, *paths(ACCUMULATED), MICRO_STEP).code == 0
    by_default = alone(ranks, *paths(ACCUMULATED))
    assert by_default.code == 1
    assert f"note: this trace was computed with {MICRO_STEP}" in by_default.out
    assert {"step 1: ce", "step 1: gradient norm", "expect_param/llm2vae.weight"} <= set(by_default.failed)
    assert "step 1: lr" not in by_default.failed


@needs(DP2)
def test_a_trace_of_two_ranks_refuses_the_rule_of_micro_steps_on_one(ranks: RankPool) -> None:
    outcome = alone(ranks, *paths(DP2), MICRO_STEP)
    assert outcome.code == 2 and "data-parallel size, 2 in this trace; found 1" in outcome.err


def test_generation_is_compared_beside_training(ranks: RankPool, tmp_path: Path) -> None:
    outcome = alone(ranks, *paths(INFER, TEXT_ONLY))
    assert outcome.code == 0 and outcome.err == ""
    assert f"{INFER}: all" in outcome.out and f"{TEXT_ONLY}: all" in outcome.out
    worse = changed(TEXT_ONLY, tmp_path, lambda entries, about: entries["expect/ce"].add_(1))
    assert alone(ranks, *paths(INFER), worse).code == 1, "a row that fails matters more"


@needs(DRAWING)
def test_a_wrong_velocity_is_named(ranks: RankPool, tmp_path: Path) -> None:
    worse = changed(DRAWING, tmp_path, lambda entries, about: entries["t2i/expect.v_t"].mul_(1.001))
    outcome = alone(ranks, worse)
    assert outcome.code == 1 and outcome.failed == ["t2i/img0.expect.v_t"]


def a_gradient(entries: Entries, about: About) -> None:
    gradient = entries["grad/vae2llm.bias"]
    gradient[3] += 3e-5 * gradient.norm()


def a_gradient_norm(entries: Entries, about: About) -> None:
    about["grad_norms_f64"]["language_model.model.layers.2.mlp.up_proj.weight"] *= 1 + 3e-5


def a_zero_gradient(entries: Entries, about: About) -> None:
    about["grads_exactly_zero"] += ["language_model.model.norm.weight"]


def not_a_number(entries: Entries, about: About) -> None:
    entries["expect/last_hidden_state"][100, 7] = float("nan")


def a_loss(entries: Entries, about: About) -> None:
    about["loss"]["f32_flex"]["ce"] += 1e-5


@needs(EDIT)
@pytest.mark.parametrize(
    "row, change",
    [
        ("expect/attn_allowed", lambda entries, about: entries["expect/attn_allowed"][40, 2].bitwise_xor_(1)),
        ("batch/packed_position_ids", lambda entries, about: entries["batch/packed_position_ids"][9].add_(1)),
        ("batch/packed_label_ids", lambda entries, about: entries["batch/packed_label_ids"][0].add_(1)),
        ("batch/mse_loss_indexes", lambda entries, about: entries["batch/mse_loss_indexes"][5].add_(1)),
        ("expect/ce", lambda entries, about: entries["expect/ce"][4].add_(4e-5)),
        ("expect/t", lambda entries, about: entries["expect/t"][-1].add_(1e-3)),
        ("expect/last_hidden_state", not_a_number),
        ("reduced ce", a_loss),
        ("grad/vae2llm.bias", a_gradient),
        ("gradient norms (163) language_model.model.layers.2.mlp.up_proj.weight", a_gradient_norm),
        ("gradients that are zero (1) language_model.model.norm.weight", a_zero_gradient),
    ],
)
def test_one_changed_number_fails_in_its_own_row(ranks: RankPool, tmp_path: Path, row: str, change: Change) -> None:
    outcome = alone(ranks, changed(EDIT, tmp_path, change), "--json", str(tmp_path / "rows.json"))
    assert (outcome.code, outcome.failed) == (1, [row])
    assert "1 of " in outcome.out and f"closest to its tolerance: {row}" in outcome.out
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["verdict"] == "FAIL"
    failed = [found for found in content["rows"] if found["verdict"] == "FAIL"]
    assert [" ".join(filter(None, (found["name"], found.get("worst")))) for found in failed] == [row]


@pytest.mark.parametrize(
    "row, change",
    [
        ("batch/split_lens", lambda entries, about: entries["batch/split_lens"][0].add_(1)),
        ("expect/attn_allowed", lambda entries, about: entries["expect/attn_allowed"][40, 2].bitwise_xor_(1)),
        ("expect/ce", lambda entries, about: entries["expect/ce"][4].add_(4e-5)),
    ],
)
def test_one_changed_number_of_a_text(ranks: RankPool, tmp_path: Path, row: str, change: Change) -> None:
    outcome = alone(ranks, changed(TEXT_ONLY, tmp_path, change))
    assert (outcome.code, outcome.failed) == (1, [row])


@needs(EDIT)
def test_an_expectation_that_we_do_not_know_fails(ranks: RankPool, tmp_path: Path) -> None:
    """Rather than being passed over."""

    def change(entries: Entries, about: About) -> None:
        entries["expect/layer9"] = entries["expect/last_hidden_state"].clone()
        entries["grad/language_model.model.layers.9.mlp.up_proj.weight"] = entries["grad/llm2vae.weight"].clone()

    outcome = alone(ranks, changed(EDIT, tmp_path, change))
    assert outcome.failed == ["expect/layer9", "grad/language_model.model.layers.9.mlp.up_proj.weight"]


@pytest.mark.parametrize("name", ["train_03_vlm", "train_05_interleave3", "train_06_video_groups"])
def test_a_case_without_samples_is_read_off_its_batch(ranks: RankPool, tmp_path: Path, name: str) -> None:
    outcome = alone(ranks, changed(name, tmp_path, lambda entries, about: about.pop("samples")))
    assert (outcome.code, outcome.failed) == (0, [])
    assert "note: samples are not described" in outcome.out


@needs("train_05_interleave3")
def test_random_weights_and_the_clock(ranks: RankPool, tmp_path: Path) -> None:
    case, file = changed("train_05_interleave3", tmp_path, without_weights), tmp_path / "time.json"
    outcome = alone(ranks, case, "--random-weights", "--time", "3", "--json", str(file))
    assert (outcome.code, outcome.failed) == (0, [])
    content = json.loads(file.read_text())
    assert {row["name"].split("/")[0] for row in content["rows"]} == {"batch"}
    assert content["cpu_seconds"] > 0 and 0 < content["wall_seconds"] < 10
    clock = content["clocks"]["train_05_interleave3"]
    assert clock["runs"] == 3 and clock["gflops"] > 0
    assert f"{content['wall_seconds']:.4f} s wall, {content['cpu_seconds']:.4f} s CPU" in outcome.out


@needs("train_06_video_groups")
def test_random_weights_without_samples(ranks: RankPool, tmp_path: Path) -> None:
    def change(entries: Entries, about: About) -> None:
        without_weights(entries, about)
        del about["samples"]

    outcome = alone(ranks, changed("train_06_video_groups", tmp_path, change), "--random-weights", "--time", "1")
    assert (outcome.code, outcome.failed) == (0, [])
    assert "forward + backward" in outcome.out and "note: samples are not described" in outcome.out


def test_ranks_started_by_the_command(tmp_path: Path) -> None:
    """The whole way once, with processes of its own: exit code, table once, JSON from rank 0."""
    words = [*paths(TEXT_ONLY), "parallel.tp=2", "--nproc", "2", "--time", "1", "--json", str(tmp_path / "o")]
    result = subprocess.run([sys.executable, "-m", "megabagel", "parity", *words], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count(f"{TEXT_ONLY}: all") == 1 and result.stdout.count("forward + backward") == 1
    content = json.loads((tmp_path / "o").read_text())
    assert (content["ranks"], content["overrides"]) == (2, ["parallel.tp=2"])

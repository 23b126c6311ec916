"""What `megabagel parity` cannot use ends in one message that names the file and what is wrong, and exit code 2."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.parity_command import (
    DP2,
    EDIT,
    PRIM,
    TEXT_ONLY,
    About,
    Change,
    Entries,
    changed,
    parity,
    paths,
    without_weights,
)
from tests.support.parity_files import needs, stem
from tests.support.rank_pool import RankPool

CASE = TEXT_ONLY
UP = "language_model.model.layers.1.mlp.up_proj.weight"
TABLE = "latent_pos_embed.pos_embed"


def refused(ranks: RankPool, *words: str, size: int = 1) -> str:
    """The message, the same on every rank and the only output."""
    outcomes = ranks.run(size, parity, words)
    assert {(outcome.code, outcome.out) for outcome in outcomes} == {(2, "")}
    (message,) = {outcome.err for outcome in outcomes}
    assert message.startswith("megabagel: error: ") and message.count("megabagel: error: ") == 1
    return message


def wrong_weights(entries: Entries, about: About) -> None:
    """All mistakes at once: they are told at once."""
    entries[UP] = entries[UP][:5].clone()
    entries["language_model.model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    del entries["llm2vae.bias"]
    entries["vae2llm.bias"] = entries["vae2llm.bias"].to(torch.int8)


@needs(EDIT)
@pytest.mark.parametrize(
    "change, said",
    [
        (
            wrong_weights,
            [
                f"{EDIT}.safetensors: 4 tensors do not fit",
                f"{UP}: [5, 64]",
                "expected [96, 64]",
                "layers.9.mlp.up_proj.weight: unexpected, [2]",
                "llm2vae.bias: missing, expected [64]",
                "vae2llm.bias: type I8",
            ],
        ),
        (
            lambda entries, about: entries.update({TABLE: torch.zeros(16, 64)}),
            [f"{TABLE}: [16, 64]", "expected [144, 64]", "max_latent_size 4"],
        ),
        (lambda entries, about: entries[TABLE][30].add_(0.5), [f"{TABLE}: row 30 is 0.5 off"]),
        (without_weights, [f"{EDIT}.safetensors: holds no weights", "--random-weights"]),
        (
            lambda entries, about: about["config"]["llm_config"].update(layer_module="Qwen3Layer"),
            [f"{EDIT}.json: layer_module = 'Qwen3Layer'", "Qwen2MoTDecoderLayer"],
        ),
        (
            lambda entries, about: about["config"]["llm_config"].update(num_hidden_layers="4"),
            ["num_hidden_layers is '4'; expected a whole number"],
        ),
        (lambda entries, about: about.pop("config"), [f"{EDIT}.json: no entry 'config'"]),
        (lambda entries, about: about["config"].pop("llm_config"), [f"{EDIT}.safetensors", "'llm_config'"]),
        (lambda entries, about: about.pop("grad_norms_f64"), [f"{EDIT}.json: no entry 'grad_norms_f64'"]),
        (lambda entries, about: about["dropout_draws"].pop(), [f"{EDIT}.safetensors", "do not make a train case"]),
        (lambda entries, about: about["samples"].pop(), ["packed_text_ids has 73 rows, but its samples make 50"]),
        (lambda entries, about: entries.pop("batch/noise"), ["batch/noise has 0 rows, but its samples make 56"]),
        (
            lambda entries, about: entries["batch/packed_text_ids"][3].fill_(256),
            ["batch/packed_text_ids holds 256", "vocab_size is 256"],
        ),
    ],
)
def test_a_case_that_does_not_fit_itself(ranks: RankPool, tmp_path: Path, change: Change, said: list[str]) -> None:
    message = refused(ranks, changed(EDIT, tmp_path, change))
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize("kept", [".json", ".safetensors"])
def test_one_file_of_the_pair_is_missing(ranks: RankPool, tmp_path: Path, kept: str) -> None:
    shutil.copy(f"{stem(CASE)}{kept}", tmp_path)
    missing = {".json": ".safetensors", ".safetensors": ".json"}[kept]
    assert f"{tmp_path / CASE}{missing}: no such file" in refused(ranks, str(tmp_path / f"{CASE}{kept}"))


@pytest.mark.parametrize("size", [0, 500, -1])
def test_a_truncated_file(ranks: RankPool, tmp_path: Path, size: int) -> None:
    whole = stem(CASE).with_suffix(".safetensors").read_bytes()
    (tmp_path / f"{CASE}.safetensors").write_bytes(whole[:size])
    shutil.copy(f"{stem(CASE)}.json", tmp_path)
    assert f"{CASE}.safetensors: not a readable safetensors file" in refused(ranks, str(tmp_path / CASE))


@pytest.mark.parametrize("text", [b'{"config": ', b"[1, 2]", b"\xff\xfe{}"])
def test_damaged_json(ranks: RankPool, tmp_path: Path, text: bytes) -> None:
    shutil.copy(f"{stem(CASE)}.safetensors", tmp_path)
    (tmp_path / f"{CASE}.json").write_bytes(text)
    message = refused(ranks, str(tmp_path / CASE))
    assert f"{CASE}.json: " in message and "JSON" in message and "copy the case again" in message


def test_a_kind_that_nobody_knows(ranks: RankPool, tmp_path: Path) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copy(f"{stem(CASE)}{suffix}", tmp_path / f"eval_04{suffix}")
    assert "eval_04.safetensors: unknown kind of case" in refused(ranks, str(tmp_path / "eval_04"))


@needs(DP2)
def test_a_trace_needs_its_cases_beside_it(ranks: RankPool, tmp_path: Path) -> None:
    message = refused(ranks, changed(DP2, tmp_path, lambda entries, about: None))
    assert f"{tmp_path}/train_04_edit.safetensors: no such file" in message


@pytest.mark.parametrize(
    "name, change, said",
    [
        (
            PRIM[0],
            lambda entries, about: entries.update({"fft/1": torch.zeros(2)}),
            "entries fft/...: expected mask",
        ),
        (PRIM[1], lambda entries, about: entries.pop("decoder.conv_in.weight"), f"{PRIM[1]}.safetensors: "),
    ],
)
def test_building_blocks(ranks: RankPool, tmp_path: Path, name: str, change: Change, said: str) -> None:
    assert said in refused(ranks, changed(name, tmp_path, change))


@pytest.mark.parametrize(
    "size, word, said",
    [
        (1, "parallel.tp=2", "world size = 1, parallel.tp = 2"),
        (3, "parallel.cp=2", "world size = 3"),
        (3, "parallel.tp=3", "model.kv_heads = 2, parallel.tp = 3"),
        (2, "parallel.tpp=2", "parallel.tpp = 2: unknown key; did you mean parallel.tp?"),
        (1, "parallel.tp=two", "parallel.tp = 'two': expected an integer"),
        (1, "tp=2", "tp=2.safetensors: no such file"),
    ],
)
def test_overrides_that_do_not_fit(ranks: RankPool, size: int, word: str, said: str) -> None:
    assert said in refused(ranks, *paths(CASE), word, size=size)


@pytest.mark.parametrize("place", ["missing/all.json", "."])
def test_json_that_cannot_be_written(ranks: RankPool, tmp_path: Path, place: str) -> None:
    """Told before anything runs."""
    assert f"--json {tmp_path / place}: " in refused(ranks, *paths(CASE), "--json", str(tmp_path / place))


def test_no_case_at_all(ranks: RankPool) -> None:
    assert "no case named" in refused(ranks, "parallel.tp=2")

"""Checkpoints of training runs, whatever grid wrote them, as published folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megabagel.checkpoint.hf.exporter import export
from megabagel.checkpoint.hf.importer import import_folder
from megabagel.checkpoint.hf.names import official_name, table_sides
from megabagel.errors import UserError
from megabagel.model.positions import sincos_table
from tests.support import checkpoint_states
from tests.support.grid_run import base_config
from tests.support.published import MODEL, publish, weights
from tests.support.rank_pool import RankPool

Trained = tuple[Path, dict[str, np.ndarray]]
"""A checkpoint, and its tensors by key."""


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Some steps on tensor-parallel ranks, which hold rows of some weights and columns of others."""
    folder = tmp_path_factory.mktemp("trained")
    config, size = checkpoint_states.config_on((2, 1, 1, 1, 1), folder)
    lives = ranks.run(size, checkpoint_states.write, config)
    return folder / "checkpoints" / "step_00000002", checkpoint_states.whole(lives)


@pytest.mark.parametrize(
    ("weights", "dtype", "kind", "expected"),
    [
        (None, "as-stored", "ema", torch.float32),
        ("trained", "fp32", "weight", torch.float32),
        ("ema", "bf16", "ema", torch.bfloat16),
    ],
)
def test_any_grid(
    trained: Trained, tmp_path: Path, weights: str | None, dtype: str, kind: str, expected: torch.dtype
) -> None:
    checkpoint, states = trained
    export(checkpoint, tmp_path / "out", weights, dtype)
    found = load_file(tmp_path / "out" / "ema.safetensors")
    model = base_config().model
    tables = {name: torch.nn.Parameter(sincos_table(model.hidden, side)) for name, side in table_sides(model).items()}
    states = {key.partition("/")[2]: state for key, state in states.items() if key.startswith(f"{kind}/")}
    wanted = {official_name(name): torch.from_numpy(state) for name, state in states.items()} | tables
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == expected
        assert torch.equal(found[name], tensor.to(expected)), name


def test_what_is_exported_can_be_imported(trained: Trained, tmp_path: Path) -> None:
    """The config files written along describe the model."""
    export(trained[0], tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "again")
    theirs, ours = (
        json.loads((folder / "manifest.json").read_text())["model"] for folder in (tmp_path / "again", trained[0])
    )
    assert {key for key in ours if ours[key] != theirs[key]} <= {"init_std"}  # weights say nothing of it


def test_absent_files_are_named(trained: Trained, tmp_path: Path) -> None:
    assert export(trained[0], tmp_path / "out").notes == (
        "absent: ae.safetensors, tokenizer files (--assets names a folder to copy them from)",
    )


def test_assets(trained: Trained, tmp_path: Path) -> None:
    """Copied from the folder that is named, if its config is the model's."""
    export(trained[0], tmp_path / "first")
    (tmp_path / "first" / "tokenizer.json").write_text("{}")
    (tmp_path / "first" / "ae.safetensors").write_bytes(b"pictures")
    assert export(trained[0], tmp_path / "second", beside=tmp_path / "first").notes == ()
    for name in ("tokenizer.json", "ae.safetensors", "llm_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    config = tmp_path / "first" / "llm_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 10000.0}))
    with pytest.raises(UserError, match=r"llm_config.json .* has rope_base = 10000.0, .* has 1000000.0"):
        export(trained[0], tmp_path / "third", beside=tmp_path / "first")
    with pytest.raises(UserError, match=r"--assets .*nowhere: no such folder"):
        export(trained[0], tmp_path / "third", beside=tmp_path / "nowhere")
    assert not (tmp_path / "third").exists()


def test_no_averages(tmp_path: Path) -> None:
    import_folder(publish(tmp_path / "source", weights()), tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"--weights ema, but .*checkpoint holds no averaged weights"):
        export(tmp_path / "checkpoint", tmp_path / "out", "ema")


def test_types_can_be_changed(tmp_path: Path) -> None:
    source = weights()
    import_folder(publish(tmp_path / "source", source), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", dtype="fp32")
    for name, tensor in load_file(tmp_path / "out" / "ema.safetensors").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, source[name].float())


@pytest.mark.parametrize("file", ["rank_00000.safetensors", "index.json", "manifest.json"])
def test_damage(tmp_path: Path, file: str) -> None:
    """Of the same length, so that only reading finds it."""
    import_folder(publish(tmp_path / "source", weights()), tmp_path / "checkpoint")
    damaged = tmp_path / "checkpoint" / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2] + bytes(100) + content[len(content) // 2 + 100 :])
    with pytest.raises(UserError, match="checkpoint"):
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        export(tmp_path / "nothing", tmp_path / "out")


def test_model_without_a_tower_needs_no_tower_config(tmp_path: Path) -> None:
    model = type(MODEL)(**(vars(MODEL) | {"visual_und": False}))
    source = publish(tmp_path / "source", weights(model), model)
    (source / "vit_config.json").unlink()
    import_folder(source, tmp_path / "checkpoint")
    shutil.rmtree(source)
    export(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out" / "vit_config.json").exists()

"""A stage starts from the weights of the one before: other weights learn, on another grid, from step 0."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabagel.config.schema import Config
from megabagel.errors import UserError
from tests.support.config_tree import change
from tests.support.grid_run import on_grid
from tests.support.rank_pool import RankError, RankPool
from tests.support.small_run import small_config
from tests.train.test_resume import train, weights_left_open_show

Weights = dict[str, np.ndarray]
CONNECTOR_ALONE = ("llm", "vit", "latent")


def weights_at_start(config: Config) -> tuple[Weights, Weights, int]:
    """(weights, averages, step) that a run begins with, of one rank that holds them all, in the optimizer's order."""
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend
    from megabagel.train.build import build_trainer

    cpu_backend.install()
    with weights_left_open_show():
        trainer = build_trainer(config, mesh.build(config), draw=False)
    assert config.run.init_from is not None
    trainer.start_from(Path(config.run.init_from))
    found: dict[str, Weights] = {"weight": {}, "ema": {}}
    for tensor in trainer.tensors().values():
        kind, _, name = tensor.key.partition("/")
        if kind in found:
            whole = found[kind].setdefault(name, np.full(tensor.global_shape, np.nan, np.float32))
            box = zip(tensor.global_offset, tensor.data.shape, strict=True)
            whole[tuple(slice(at, at + size) for at, size in box)] = tensor.data.float().numpy()
    return found["weight"], found["ema"], trainer.step


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def aligned(ranks: RankPool, shapes: Path, root: Path) -> Path:
    """The checkpoint of a first stage: the connector alone learns, over two pipeline stages, without QK-norm."""
    config = change(
        small_config(shapes, root / "align"),
        {"train.steps": 3, "train.freeze": CONNECTOR_ALONE, "train.ema": 0.0, "model.qk_norm": False},
    )
    ranks.run(2, train, on_grid(config, 1, 2, 1, 1))
    return root / "align/checkpoints/step_00000003"


@pytest.fixture(scope="module")
def pretrained(ranks: RankPool, shapes: Path, root: Path, aligned: Path) -> Path:
    """The checkpoint of a second stage, with QK-norm, in which the tower stays as it is."""
    changes: dict[str, Any] = {"train.steps": 3, "train.freeze": ("vit",), "run.init_from": str(aligned)}
    config = change(small_config(shapes, root / "pt"), changes)
    ranks.run(2, train, on_grid(config, 2, 1, 1, 1))
    return root / "pt/checkpoints/step_00000003"


def start(ranks: RankPool, shapes: Path, folder: Path, **changes: Any) -> tuple[Weights, Weights, int]:
    config = change(small_config(shapes, folder / "next"), {key.replace("__", "."): v for key, v in changes.items()})
    return ranks.run(1, weights_at_start, config)[0]


def test_alignment_moves_the_connector_alone(ranks: RankPool, shapes: Path, tmp_path: Path, aligned: Path) -> None:
    config = change(
        small_config(shapes, tmp_path / "fresh"), {"train.steps": 1, "train.ema": 0.0, "model.qk_norm": False}
    )
    ranks.run(1, train, config)  # its first step has learning rate 0: these are the initial weights
    options = {"model__qk_norm": False, "train__ema": 0.0}
    before, _, _ = start(
        ranks, shapes, tmp_path, run__init_from=str(tmp_path / "fresh/checkpoints/step_00000001"), **options
    )
    after, _, _ = start(ranks, shapes, tmp_path, run__init_from=str(aligned), **options)
    assert before.keys() == after.keys()
    moved = {name for name, weight in before.items() if not np.array_equal(weight, after[name])}
    assert moved == {f"embed.connector.{fc}.{leaf}" for fc in ("fc1", "fc2") for leaf in ("weight", "bias")}


def test_the_next_stage_starts_from_all_weights_at_step_0(
    ranks: RankPool, shapes: Path, tmp_path: Path, aligned: Path
) -> None:
    """Frozen weights are in the checkpoint too. QK-norm is new: it starts as ones."""
    weights, averages, step = start(ranks, shapes, tmp_path, run__init_from=str(aligned))
    assert step == 0
    assert weights.keys() == averages.keys()
    norms = {name for name in weights if "q_norm" in name or "k_norm" in name}
    assert len(norms) == 8 and all((weights[name] == 1).all() for name in norms)
    for name, weight in weights.items():
        assert np.isfinite(weight).all() and np.array_equal(weight, averages[name]), name


def test_averaged_weights_may_be_the_start(ranks: RankPool, shapes: Path, tmp_path: Path, pretrained: Path) -> None:
    """What did not learn has no average but itself."""
    last, _, _ = start(ranks, shapes, tmp_path, run__init_from=str(pretrained))
    mean, _, _ = start(ranks, shapes, tmp_path, run__init_from=str(pretrained), run__init_weights="ema")
    differ = {name for name in last if not np.array_equal(last[name], mean[name])}
    assert "layers.0.mlp.gen.down.weight" in differ and "embed.connector.fc1.weight" in differ
    assert not any(name.startswith("embed.vit.") for name in differ)


def test_the_curve_of_a_stage_does_not_depend_on_the_grid(
    ranks: RankPool, shapes: Path, tmp_path: Path, aligned: Path, pretrained: Path
) -> None:
    config = change(
        small_config(shapes, tmp_path / "one"),
        {"train.steps": 3, "train.freeze": ("vit",), "run.init_from": str(aligned)},
    )
    ranks.run(1, train, config)
    one, two = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "one", pretrained.parents[1])
    )
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__ffn": 64}, ["its model.ffn is 48, this run's 64", "Set model.ffn=48"]),
        ({"run__init_weights": "ema"}, ["holds no averaged weights", "run.init_weights=trained"]),
    ],
)
def test_starts_that_cannot_be(
    ranks: RankPool, shapes: Path, tmp_path: Path, aligned: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RankError) as error:
        start(ranks, shapes, tmp_path, run__init_from=str(aligned), **changes)
    assert UserError.__name__ in str(error.value)
    for word in (*words, str(aligned)):
        assert word in str(error.value)


def test_another_freeze_set_does_not_resume(ranks: RankPool, shapes: Path, root: Path, aligned: Path) -> None:
    config = change(
        small_config(shapes, root / "align"),
        {"train.steps": 4, "train.freeze": ("vit",), "train.ema": 0.0, "model.qk_norm": False},
    )
    with pytest.raises(RankError, match=r"train.freeze=\['vit'\], but .* run.init_from="):
        ranks.run(1, train, config)

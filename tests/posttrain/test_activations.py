"""Activation strength of neuron clusters (SRUM appendix C): means over real tokens, the same on every grid."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megabagel.errors import UserError
from tests.support.rank_pool import RankPool


def small_config(variant: Any, **grid: Any) -> Any:
    from megabagel.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, ResizeConfig, VitConfig

    vit = VitConfig(layers=1, hidden=32, heads=2, ffn=48, grid=8)
    sizes = ModelConfig(
        layers=2,
        hidden=32,
        heads=4,
        kv_heads=2,
        ffn=48,
        vocab=264,
        vit=vit,
        latent_grid=8,
        variant=variant,
        init_std=0.3,
    )
    data = DataConfig(vae_resize=ResizeConfig(64, 16), vit_resize=ResizeConfig(56, 14))
    return Config(model=sizes, parallel=ParallelConfig(sp=False, chunk=16, **grid), data=data)


def measured(variant: str, grid: dict[str, int]) -> list[Any]:
    """Means of both tasks, [layers, experts, neurons] each."""
    from megabagel.inference.api import Pipeline
    from megabagel.inference.load import Source
    from megabagel.model.init_weights import initialize_weights
    from megabagel.parallel import mesh
    from megabagel.posttrain.activations import ActivationMeter, Sample, Settings, task_means

    config = small_config(variant, **grid)
    built = mesh.build(config)
    source = Source(
        Path("nowhere"), config, lambda stage: initialize_weights(stage, config.model, 0), "trained", "a digest"
    )
    model = Pipeline(source, built, cache_tokens=2048)
    page = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    samples = [
        Sample("und", "what is this?", (page,)),
        Sample("und", "why"),
        Sample("gen", "a cat"),
    ]
    means = task_means(model, built, samples, Settings((48, 32), 4, 5))
    return [means.reshape(2, *ActivationMeter(model, built).shape)]


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[str, np.ndarray]:
    return {variant: ranks.run(1, measured, variant, {})[0][0] for variant in ("mot", "dense")}


def test_experts_see_their_own_tokens(alone: dict[str, np.ndarray]) -> None:
    und, gen = alone["mot"]
    assert not und[:, 1].any(), "no latent in a question"
    assert gen[:, 1].all() and gen[:, 0].all() and und[:, 0].all()
    assert alone["dense"].shape == (2, 2, 1, 48)


@pytest.mark.parametrize(("variant", "grid"), [("mot", {"tp": 2}), ("mot", {"pp": 2}), ("dense", {"cp": 2})], ids=str)
def test_any_grid(ranks: RankPool, alone: dict[str, np.ndarray], variant: str, grid: dict[str, int]) -> None:
    first, second = ranks.run(2, measured, variant, grid)
    assert np.array_equal(first[0], second[0])
    np.testing.assert_allclose(first[0], alone[variant], rtol=2e-4, atol=2e-5)


def test_padding_rows_do_not_count() -> None:
    from megabagel.posttrain.activations import ActivationMeter

    placement = SimpleNamespace(token_T=np.array([0, 2, -1, -1, 1, -1]), und=4, gen=2)
    runner: Any = SimpleNamespace(placement=placement)
    model: Any = SimpleNamespace(
        engine=SimpleNamespace(runner=runner),
        config=SimpleNamespace(model=SimpleNamespace(layers=1, ffn=2, variant="mot")),
    )
    meter = ActivationMeter(model, None)
    meter.start()
    meter._add(0, 0, None, (torch.tensor([[1.0, -4], [3, 2], [100, 100], [100, 100]]),))
    meter._add(0, 1, None, (torch.tensor([[5.0, 6], [100, 100]]),))
    assert meter.mean().tolist() == [[[2, -1], [5, 6]]]
    model.config.model.variant = "dense"
    meter = ActivationMeter(model, None)
    for _ in range(2):
        meter._add(0, 0, None, (torch.tensor([[1.0, -4], [3, 2], [100, 100], [100, 100]]),))
        meter._add(0, 0, None, (torch.tensor([[5.0, 8], [100, 100]]),))
    assert meter.mean().tolist() == [[[3, 2]]]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, capsys: Any) -> None:
    from megabagel.cli import main
    from megabagel.inference import load

    tasks = tmp_path / "tasks.jsonl"
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    lines = [{"task": "und", "prompt": "what?", "images": ["red.png"]}, {"task": "gen", "prompt": "a dog"}]
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(load, "open_source", lambda *_: model.source)
    words = [
        "runs/a",
        "runs/b",
        "--tasks",
        str(tasks),
        "--size",
        "32x32",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["posttrain", "activations", *words]) == 0
    found = json.loads((tmp_path / "out/activations.json").read_text())
    assert found["strength"]["runs/a"] == found["strength"]["runs/b"], "the same weights"
    of_base = found["strength"]["runs/a"]
    assert of_base["und_task/und_cluster"] > of_base["gen_task/und_cluster"]
    assert of_base["gen_task/gen_cluster"] > of_base["und_task/gen_cluster"]
    assert "| runs/b |" in capsys.readouterr().out and Image.open(tmp_path / "out/activations.png").size[0] > 100


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"task": "und", "prompt": "why"}', "no sample of task gen"),
        ('{"task": "see", "prompt": "why"}', "line 1: expected"),
        ("[1]", "line 1: expected"),
    ],
)
def test_refused_tasks(tmp_path: Path, line: str, says: str) -> None:
    from megabagel.posttrain.activations import samples_of

    (tmp_path / "tasks.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=says):
        samples_of(str(tmp_path / "tasks.jsonl"))

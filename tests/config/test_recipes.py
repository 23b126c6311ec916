"""The recipes of BAGEL's stages have the numbers of the paper, build at full size, and train scaled down."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megabagel.config.load import load
from megabagel.config.rules import value_at
from megabagel.config.schema import Config
from megabagel.errors import UserError
from tests.support.cli_harness import job, metrics
from tests.support.rank_pool import RankPool

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
STAGES = ("align", "pt", "ct", "sft")
STAGE_RECIPES = [f"bagel_{size}_{stage}" for size in ("7b", "1b5") for stage in STAGES]
RELEASED = ["bagel_7b_released", "bagel_7b_released_finetune"]
RECIPES = [*STAGE_RECIPES, *RELEASED]

every_recipe = pytest.mark.parametrize("name", RECIPES)
every_stage = pytest.mark.parametrize("name", STAGE_RECIPES)


def recipe(name: str, *overrides: str) -> Config:
    """A recipe without the file of VAE weights that it names."""
    return load(EXAMPLES / f"{name}.yaml", ["model.vae.codec=blocks", *overrides])


def test_no_recipe_is_left_out() -> None:
    assert {path.stem for path in EXAMPLES.glob("bagel_*.yaml")} == set(RECIPES)


# The numbers

TABLE_3: dict[str, tuple[Any, Any, Any, Any]] = {
    "train.lr": (1e-3, 1e-4, 1e-4, 2.5e-5),
    "train.schedule": ("cosine", "constant", "constant", "constant"),
    "train.warmup": (250, 2500, 2500, 500),
    "train.steps": (5_000, 200_000, 100_000, 15_000),
    "train.ema": (0.0, 0.9999, 0.9999, 0.995),
    "train.ce_weight": (1.0, 0.25, 0.25, 0.25),
    "train.mse_weight": (0.0, 1.0, 1.0, 1.0),
    "train.weight_decay": (0.0, 0.0, 0.0, 0.0),
    "train.clip": (1.0, 1.0, 1.0, 1.0),
    "train.beta1": (0.9, 0.9, 0.9, 0.9),
    "train.beta2": (0.95, 0.95, 0.95, 0.95),
    "train.eps": (1e-15, 1e-15, 1e-15, 1e-15),
    "train.freeze": (("llm", "vit", "latent"), (), (), ()),
    "model.qk_norm": (False, True, True, True),
    "data.min_tokens": (32 * 1024, 32 * 1024, 40 * 1024, 40 * 1024),
    "data.max_tokens": (36 * 1024, 36 * 1024, 45 * 1024, 45 * 1024),
    "data.max_sample_tokens": (16 * 1024, 16 * 1024, 40 * 1024, 40 * 1024),
    "data.vit_resize.min_size": (378, 224, 378, 378),
    "data.vit_resize.max_size": (378, 980, 980, 980),
}
"""By stage. Section 2.3 of the paper has the dropout, section 4 what learns and where q/k norms begin."""

GENERATES = {
    "data.vae_resize.min_size": (None, 256, 512, 512),
    "data.vae_resize.max_size": (None, 512, 1024, 1024),
    "train.timestep_shift": (None, 1.0, 4.0, 4.0),
}
"""Rows of table 3 that say nothing about the alignment."""

RATIOS = {
    "text": (0.0, 0.05, 0.05, 0.05),
    "t2i": (0.0, 0.6, 0.4, 0.3),
    "i2t": (1.0, 0.1, 0.1, 0.05),
    "interleave-und": (0.0, 0.1, 0.15, 0.2),
    "video": (0.0, 0.1, 0.15, 0.2),
    "web": (0.0, 0.05, 0.15, 0.2),
}
TASKS = {
    "text": {"text"}, "t2i": {"t2i"}, "i2t": {"i2t"}, "interleave-und": {"interleave"}, "video": {"video"},
    "web": {"interleave", "edit"},
}  # fmt: skip
SEEN_TOKENS = (4.9e9, 2.5e12, 2.6e12, 72.7e9)

EVERYWHERE = {
    "train.precision": "bf16",
    "train.loss_normalization": "global_batch",
    "train.timestep_precision": "fp32",
    "model.rope_precision": "fp32",
    "model.interpolate_pos": False,
    "model.latent_grid": 64,
    "model.vit.grid": 70,
    "data.drop_text": 0.1,
    "data.drop_vit": 0.5,
    "data.drop_latent": 0.1,
    "parallel.sp": True,
    "parallel.recompute": "full",
    "run.init_from": None,
    "run.init_weights": "trained",
}

AS_RELEASED = {
    **EVERYWHERE,
    "train.lr": 1e-4,
    "train.schedule": "constant",
    "train.warmup": 2000,
    "train.steps": 500_000,
    "train.ema": 0.9999,
    "train.ce_weight": 1.0,
    "train.mse_weight": 1.0,
    "train.weight_decay": 0.0,
    "train.clip": 1.0,
    "train.beta1": 0.9,
    "train.beta2": 0.95,
    "train.eps": 1e-15,
    "train.timestep_shift": 1.0,
    "train.timestep_precision": "bf16",
    "train.loss_normalization": "micro_step",
    "train.freeze": (),
    "model.rope_precision": "bf16",
    "model.qk_norm": True,
    "data.min_tokens": 32768,
    "data.max_tokens": 36864,
    "data.max_sample_tokens": 16384,
    "data.drop_vit": 0.3,
    "data.drop_latent": 0.3,
    "data.dropped_images_advance": True,
    "data.vae_resize.min_size": 512,
    "data.vae_resize.max_size": 1024,
    "data.vae_resize.max_pixels": 1_806_336,
    "data.vit_resize.min_size": 378,
    "data.vit_resize.max_size": 980,
    "data.vit_resize.max_pixels": 2_007_040,
    "checkpoint.every": 2000,
    "telemetry.log_every": 10,
}
"""The released trainer's defaults, and its example's image sizes (docs/bagel.md#paper-and-release, #image-sizes)."""

AS_FINETUNED = {
    **AS_RELEASED,
    "train.lr": 2e-5,
    "data.min_tokens": 10240,
    "data.max_tokens": 11520,
    "data.max_sample_tokens": 10240,
    "run.init_weights": "trained",
    "telemetry.log_every": 1,
}

QWEN: dict[str, dict[str, Any]] = {
    "7b": {"layers": 28, "hidden": 3584, "heads": 28, "kv_heads": 4, "ffn": 18944, "vocab": 152064},
    "1b5": {"layers": 28, "hidden": 1536, "heads": 12, "kv_heads": 2, "ffn": 8960, "vocab": 151936},
}


def values(config: Config, keys: dict[str, Any]) -> dict[str, Any]:
    """What the config has at `keys`."""
    return {key: value_at(config, key) for key in keys}


@every_stage
def test_stages_have_the_numbers_of_the_paper(name: str) -> None:
    config, stage = recipe(name), STAGES.index(name.split("_")[-1])
    expected = EVERYWHERE | {key: row[stage] for key, row in TABLE_3.items()}
    expected |= {key: row[stage] for key, row in GENERATES.items() if row[stage] is not None}
    assert values(config, expected) == expected


@every_stage
def test_sources_have_the_sampling_ratios_of_the_paper(name: str) -> None:
    stage = STAGES.index(name.split("_")[-1])
    weights = dict.fromkeys(RATIOS, 0.0)
    tasks: dict[str, set[str]] = {kind: set() for kind in RATIOS}
    for source in recipe(name).data.sources:
        kind = "web" if source.name == "edit" else source.name  # the paper counts edits as web data
        weights[kind] += source.weight
        tasks[kind].add(source.task)
        assert source.path == f"{source.name}-*.tar"
    assert weights == pytest.approx({kind: row[stage] for kind, row in RATIOS.items()})
    assert tasks == {kind: TASKS[kind] if weights[kind] else set() for kind in RATIOS}


@every_stage
def test_steps_see_the_tokens_of_the_paper(name: str) -> None:
    """Not fewer, and at most a tenth more, from packs of the smallest size; many numbers of ranks divide the step."""
    train, data = recipe(name).train, recipe(name).data
    assert train.packs_per_step % 32 == 0
    seen = SEEN_TOKENS[STAGES.index(name.split("_")[-1])]
    assert seen <= train.steps * train.packs_per_step * data.min_tokens <= 1.1 * seen


@pytest.mark.parametrize("stage", STAGES)
def test_the_small_recipes_differ_in_size_alone(stage: str) -> None:
    large, small = recipe(f"bagel_7b_{stage}"), recipe(f"bagel_1b5_{stage}")
    assert small.run == replace(large.run, dir=f"runs/bagel_1b5_{stage}")
    assert small.model == replace(large.model, **QWEN["1b5"])
    assert replace(large.model, **QWEN["7b"]) == large.model
    assert replace(small, run=large.run, model=large.model, parallel=large.parallel) == large


@pytest.mark.parametrize(("name", "expected"), list(zip(RELEASED, (AS_RELEASED, AS_FINETUNED), strict=True)))
def test_released_recipes_have_the_numbers_of_the_code(name: str, expected: dict[str, Any]) -> None:
    config = recipe(name)
    assert values(config, expected) == expected
    assert [(source.task, source.weight) for source in config.data.sources] == [
        ("t2i", 1.0), ("edit", 1.0), ("interleave", 1.0),
    ]  # fmt: skip


@every_recipe
def test_recipes_name_the_files_of_the_published_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bagel/official/ae\.safetensors"):
        load(EXAMPLES / f"{name}.yaml")
    (tmp_path / "ae.safetensors").touch()
    config = load(EXAMPLES / f"{name}.yaml", [f"model.vae.path={tmp_path}/ae.safetensors"])
    assert (config.model.vae.codec, config.data.tokenizer) == ("flux", "bagel/official/tokenizer.json")
    assert config.run.dir == f"runs/{name}"


# Full size


def parameters(hidden: int, kv: int, ffn: int, vocab: int, qk_norm: bool) -> int:
    """Numbers in the published file by its table of names and shapes (docs/bagel.md#tensor-names); 28 layers."""

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    attention = linear(hidden, hidden) + 2 * linear(hidden, kv) + hidden * hidden + 2 * 128 * qk_norm
    expert = 28 * (attention + 3 * hidden * ffn + 2 * hidden) + hidden
    vit_layer = 4 * linear(1152, 1152) + linear(1152, 4304) + linear(4304, 1152) + 4 * 1152
    tower = linear(588, 1152) + 4900 * 1152 + 26 * vit_layer + 2 * 1152
    connector = linear(1152, hidden) + linear(hidden, hidden)
    latent = linear(256, hidden) + linear(hidden, hidden) + linear(64, hidden) + linear(hidden, 64)
    tables = (64 * 64 + 70 * 70) * hidden
    return 2 * expert + 2 * vocab * hidden + tower + connector + latent + tables


def test_the_formula_gives_the_published_size() -> None:
    assert parameters(3584, 512, 18944, 152064, qk_norm=True) == 14_607_260_128


@every_recipe
def test_recipes_build_at_full_size(name: str) -> None:
    from megabagel.checkpoint.hf.names import official_shapes

    shapes, model = official_shapes(recipe(name).model), recipe(name).model
    sizes = QWEN[name.split("_")[1]]
    kv = sizes["kv_heads"] * 128
    assert sum(map(math.prod, shapes.values())) == parameters(
        sizes["hidden"], kv, sizes["ffn"], sizes["vocab"], model.qk_norm
    )
    assert len(shapes) == (1223 if model.qk_norm else 1223 - 28 * 4)  # q and k of both experts, in 28 layers


@every_recipe
def test_the_right_weights_learn(name: str) -> None:
    import torch

    from megabagel.model.bagel import Bagel
    from megabagel.model.factory import SingleDevice

    config = recipe(name)
    with torch.device("meta"):
        model = Bagel(config.model, SingleDevice(), freeze=config.train.freeze)
    learning = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if name.endswith("align"):
        hidden = config.model.hidden
        assert learning == {
            "embed.connector.fc1.weight": 1152 * hidden,
            "embed.connector.fc1.bias": hidden,
            "embed.connector.fc2.weight": hidden * hidden,
            "embed.connector.fc2.bias": hidden,
        }
    else:
        assert learning.keys() == dict(model.named_parameters()).keys()


# Two steps, scaled down

SHARDS = {"t2i": "scenes", "i2t": "scenes", "edit": "edits", "interleave": "edits", "video": "clips", "text": "notes"}
"""Shards of the shape data set by task; its edits declare all roles."""


def scaled_down(name: str, shapes: Path, run: Path) -> list[str]:
    """Overrides that leave the recipe's mixture, precision and switches as they are."""
    sources = enumerate(recipe(name).data.sources)
    return [
        *(f"data.sources.{i}.path={SHARDS[source.task]}-*.tar" for i, source in sources),
        "model.vae.codec=blocks",
        "model={layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 48, vocab: 264, init_std: 0.1}",
        "model.vit={layers: 1, hidden: 32, heads: 2, ffn: 48}",
        "parallel={tp: 1, pp: 1, cp: 1, chunk: 8}",
        f"data={{root: {shapes}, tokenizer: bytes, min_tokens: 200, max_tokens: 256, max_sample_tokens: 256}}",
        "data.vae_resize={max_size: 64, min_size: 32}",
        "data.vit_resize={max_size: 56, min_size: 28}",
        "train={steps: 2, packs_per_step: 4, warmup: 0}",
        "telemetry={tensorboard: false, peak_tflops: 1.0}",
        f"run.dir={run}",
    ]


@every_recipe
def test_recipes_train_scaled_down(name: str, ranks: RankPool, shapes: Path, tmp_path: Path) -> None:
    job(ranks, 1, EXAMPLES / f"{name}.yaml", *scaled_down(name, shapes, tmp_path / "run")).succeeded()
    steps, generates = metrics(tmp_path / "run"), not name.endswith("align")
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["loss_ce"] > 0
        assert (step["loss_mse"] > 0) == (step["tokens_gen"] > 0) == generates
        assert all(math.isfinite(step[key]) for key in ("loss", "loss_ce", "loss_mse", "grad_norm"))
        assert step["grad_norm"] > 0


def moved(config: Config) -> set[str]:
    """Names of the weights that the run on this rank, inside the pool's process group, changes."""
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend
    from megabagel.train import run

    @contextmanager
    def here(config: Config) -> Iterator[mesh.Mesh]:
        cpu_backend.install()
        yield mesh.build(config)

    def weights(trainer: run.Trainer) -> dict[str, Any]:
        (chunk,) = trainer.optimizer.chunks
        return {name: weight.detach().clone() for name, weight in chunk.module.model.named_parameters()}

    train_step = run.Trainer.train_step
    seen: list[dict[str, Any]] = []

    def watched(trainer: run.Trainer, step: Any) -> Any:
        seen.append(weights(trainer))
        result = train_step(trainer, step)
        seen.append(weights(trainer))
        return result

    with mock.patch.object(run, "distributed", here), mock.patch.object(run.Trainer, "train_step", watched):
        run.main(config)
    return {name for name, weight in seen[0].items() if not weight.equal(seen[-1][name])}


def test_alignment_moves_the_connector_alone(ranks: RankPool, shapes: Path, tmp_path: Path) -> None:
    name = "bagel_7b_align"
    changed = ranks.run(1, moved, recipe(name, *scaled_down(name, shapes, tmp_path / "run")))[0]
    assert changed == {f"embed.connector.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}

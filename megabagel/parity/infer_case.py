"""An `infer_*` case: contexts, pictures and texts of the official generation code, through the real engine.

Ops, contexts and settings come from the case; rows of the cache, positions, masks, branches and steps are ours.
"""

from dataclasses import replace

from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.config.load import override
from megabagel.config.schema import (
    Config,
    DataConfig,
    ParallelConfig,
    ResizeConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megabagel.inference.build import build_runner, from_published
from megabagel.inference.engine import Engine
from megabagel.inference.programs import (
    Special,
)
from megabagel.parallel.attention import choose_attention
from megabagel.parallel.mesh import Mesh
from megabagel.parity.case import Case, model_config, open_case
from megabagel.parity.comparisons import Gates, Row
from megabagel.parity.infer_ops import replayed
from megabagel.parity.infer_state import SubCase
from megabagel.parity.prim_case import case_autoencoder

CACHE_TOKENS = 8192
"""Rows of the KV cache; cases are small."""


def infer_config(case: Case, overrides: list[str], ranks: int) -> Config:
    """The config of an `infer_*` case. Raises UserError for overrides that do not fit."""
    model = model_config(case)
    if "vae_weights_from" in case.about:
        other = _autoencoder_case(case)
        levels = tuple(other.entry("vae")["ch_mult"])
        vae = replace(model.vae, codec="flux", path=str(other.path), width_multipliers=levels)
        model = replace(model, vae=vae)
    data = DataConfig(
        min_tokens=1,
        max_tokens=512,
        sources=(SourceConfig(case.name, str(case.path), "text"),),
        vae_resize=ResizeConfig(max_size=model.latent_grid * model.latent_stride, min_size=model.latent_stride),
        vit_resize=ResizeConfig(max_size=model.vit.grid * model.vit.patch, min_size=model.vit.patch),
    )
    run, grid, train = RunConfig(dir="runs/parity", resume="none"), ParallelConfig(), TrainConfig(packs_per_step=ranks)
    config = override(Config(run=run, model=model, parallel=grid, data=data, train=train), overrides, str(case.path))
    return replace(config, parallel=replace(config.parallel, sp=False))


def _autoencoder_case(case: Case) -> Case:
    """The case beside this one that holds the autoencoder."""
    return open_case(case.path.with_name(case.about["vae_weights_from"]))


def compare_inference(case: Case, config: Config, mesh: Mesh, gates: Gates) -> list[Row]:
    """Run every sub-case and compare everything. Called on all ranks; rows are complete on rank 0.

    Args:
        case: an `infer_*` case.
        config: from the case, with overrides.
        mesh: grid of the job.
        gates: allowed differences.
    """
    wanted = set(case.weights)
    fill = from_published(TensorFiles(case.path, keep=wanted.__contains__))
    whole = mesh.world.size == mesh.dp.size
    runner = build_runner(config, None if whole else mesh, choose_attention(config), fill, CACHE_TOKENS)
    ids = case.entry("special_tokens")
    special = Special(ids["bos_token_id"], ids["eos_token_id"], ids["start_of_image"], ids["end_of_image"])
    engine = Engine(runner, special)
    codec = case_autoencoder(_autoencoder_case(case)) if "vae_weights_from" in case.about else None
    rows: list[Row] = []
    for tag, about in case.entry("sub_cases").items():
        rows += replayed(SubCase(tag, about, case, engine, config, mesh, gates, codec))
    return rows

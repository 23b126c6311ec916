"""A `train_*` case: one batch forward and backward, and every number that the official code gave for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from megabagel.model.inputs import StageInputs
from megabagel.parallel.attention import choose_attention
from megabagel.parallel.mesh import Mesh
from megabagel.parity.capture import Watch, visible
from megabagel.parity.case import Case, model_config
from megabagel.parity.comparisons import Gates, Row, compare, worst
from megabagel.parity.gather import gather_gradients
from megabagel.parity.machine import load_weights
from megabagel.parity.packs import OfficialBatch, fixed_noise, official_batch, packed_batch, words_S
from megabagel.sequence.batch import PackedBatch
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.sample import LATENT, TEXT, VIT
from megabagel.train.build_rank import Rank, build_rank
from megabagel.train.step import Counts, Losses

CHUNK = 16
"""Rows of the layout's unit unless `parallel.chunk` says otherwise: small, as cases are."""

PADDED = ("sample_lens", "split_lens", "attn_modes")
"""Entries of a batch whose last number is of the padding, a sample of its own, which we lay out otherwise."""

SMALL_NORM = 1e-6
"""Gradients with a smaller share of the total norm are rounding and are not compared."""


def case_config(case: Case, batches: list[OfficialBatch], train: TrainConfig, overrides: list[str]) -> Config:
    """Config of a run over the packs of a case.

    Args:
        case: gives the model.
        batches: packs of the case; the longest sets data.max_tokens.
        train: optimizer, schedule and loss settings.
        overrides: `section.key=value`.

    Raises:
        UserError: overrides do not fit.
    """
    model = model_config(case)
    data = DataConfig(
        min_tokens=1,
        max_tokens=max(batch.pack.tokens for batch in batches),
        sources=(SourceConfig(case.name, str(case.path), "text"),),
        vae_resize=ResizeConfig(max_size=model.latent_grid * model.latent_stride, min_size=model.latent_stride),
        vit_resize=ResizeConfig(max_size=model.vit.grid * model.vit.patch, min_size=model.vit.patch),
    )
    run, grid = RunConfig(dir="runs/parity", resume="none"), ParallelConfig(chunk=CHUNK)
    config = Config(run=run, model=model, parallel=grid, data=data, train=train)
    return override(config, overrides, str(case.path))


def freeze_sets(case: Case) -> tuple[str, ...]:
    """Frozen parts of the case, as names of `train.freeze`."""
    named = {str(entry).removeprefix("freeze_") for entry in case.about.get("freeze", ())}
    und = case.config["llm_config"].get("freeze_und", False)
    return tuple(sorted((named | ({"und"} if und else set())) - {"vae"}))  # the VAE never learns


@dataclass(frozen=True)
class TrainRun:
    """A case on this rank, ready to run."""

    case: Case
    machine: Rank
    official: OfficialBatch
    batch: PackedBatch


def train_config(case: Case, overrides: list[str], ranks: int) -> Config:
    """The config of a `train_*` case, whose batch every replica of the `ranks` runs as often as its schedule asks."""
    loss = case.about.get("loss", {})
    train = TrainConfig(
        packs_per_step=ranks,  # fits whatever grid they make
        ce_weight=loss.get("ce_weight", 1.0),
        mse_weight=loss.get("mse_weight", 1.0),
        timestep_shift=case.config["timestep_shift"],
        freeze=freeze_sets(case),  # type: ignore[arg-type]
    )
    return case_config(case, [official_batch(case, model_config(case))], train, overrides)


def prepare(case: Case, config: Config, mesh: Mesh, random_weights: bool) -> TrainRun:
    """Build the model of a case and its batch for this rank.

    Args:
        case: a `train_*` case.
        config: from `train_config`.
        mesh: grid of the job.
        random_weights: keep the keyed random initialization instead of loading the case's weights.
    """
    machine = build_rank(config, mesh, choose_attention(config))
    if not random_weights:
        load_weights(machine, case)
    official = official_batch(case, config.model)
    return TrainRun(case, machine, official, packed_batch(official, machine.batches))


def step(run: TrainRun) -> Losses:
    """Forward and backward from the packed batch on; forward alone where the attention engine has no backward."""
    return _run(run, _inputs(run))


def _inputs(run: TrainRun) -> StageInputs:
    return run.machine.builder.build(run.batch, fixed_noise(run.official, run.machine.config.model))


def _run(run: TrainRun, inputs: StageInputs) -> Losses:
    runner = run.machine.runner
    go = runner.backward if run.machine.builder.attention.has_backward else runner.losses
    copies = runner.fewest_micro_batches
    return go([inputs] * copies, [_counts(run, copies)] * copies)


def _counts(run: TrainRun, copies: int) -> Counts:
    """Denominators that make the sums over `copies` on every replica the numbers of one batch."""
    pack, times = run.official.pack, copies * run.machine.mesh.dp.size
    return Counts(pack.ce_tokens * times, pack.mse_tokens * times)


def compare_case(run: TrainRun, gates: Gates) -> list[Row]:
    """Run the case and compare everything. Rows come on rank 0; called on all ranks."""
    machine, inputs = run.machine, _inputs(run)
    watch, backward = Watch(machine, run.batch, inputs), machine.builder.attention.has_backward
    with watch.watching():
        losses = _run(run, inputs)
    found, gradients = watch.whole(), gather_gradients(machine) if backward else {}
    if not machine.mesh.world.first:
        return []
    return [
        *_plan_rows(run, gates),
        *_hidden_rows(run, found, gates),
        *_loss_rows(run, losses, gates),
        *(_gradient_rows(run.case, gradients, gates) if backward else ()),
    ]


def compare_plan(run: TrainRun, gates: Gates) -> list[Row]:
    """The sequence plan alone, for cases without weights."""
    return list(_plan_rows(run, gates))


def _plan_rows(run: TrainRun, gates: Gates) -> Iterator[Row]:
    """The sequence plan against the official packer: exact."""
    batch, pack, model = run.official, run.official.pack, run.machine.config.model
    follows = np.flatnonzero(pack.ce_S) + 1
    vits = [image for sample in pack.samples for image in sample.vits]
    segments = [segment for sample in pack.samples for segment in sample.segments]
    ours: dict[str, Any] = {
        "sample_lens": [sample.tokens for sample in pack.samples],
        "split_lens": [segment.length for segment in segments],
        "attn_modes": [int(segment.mode) for segment in segments],
        "vit_token_seqlens": [image.rows * image.cols for image in vits],
        "patchified_vae_latent_shapes": [(image.rows, image.cols) for image in pack.latents],
        "packed_position_ids": pack.position_S,
        "packed_text_indexes": np.flatnonzero(pack.kind_S == TEXT),
        "packed_vit_token_indexes": np.flatnonzero(pack.kind_S == VIT),
        "packed_vae_token_indexes": np.flatnonzero(pack.kind_S == LATENT),
        "ce_loss_indexes": np.flatnonzero(pack.ce_S),
        "mse_loss_indexes": np.flatnonzero(pack.noised_S),
        "packed_label_ids": words_S(batch)[follows],
        "packed_vit_position_ids": _ids(vits, model.vit.grid, model.interpolate_pos),
        "packed_latent_position_ids": _ids(pack.latents, model.latent_grid, model.interpolate_pos),
    }
    for name, values in ours.items():
        if name in batch.tensors:
            theirs = batch.tensors[name][:-1] if name in PADDED else batch.tensors[name]
            yield compare(f"batch/{name}", torch.as_tensor(values), theirs, gates.exact)
    allowed = run.case.tensors("expect").get("attn_allowed")
    if allowed is not None:
        yield compare("expect/attn_allowed", visible(run.batch), allowed, gates.exact)


def _ids(images: list, side: int, interpolate: bool) -> np.ndarray:
    ids = (grid_ids(image.rows, image.cols, side, interpolate) for image in images)
    return np.concatenate([np.zeros(0, np.int64), *ids])


def _hidden_rows(run: TrainRun, found: dict[str, Tensor], gates: Gates) -> Iterator[Row]:
    """Tensors of the forward pass by their names in the case."""
    noised_L = torch.from_numpy(run.official.pack.noised_S[run.official.pack.kind_S == LATENT])
    if len(noised_L):
        found["mse"] = found["mse"][noised_L]
    for name, theirs in run.case.tensors("expect").items():
        if name != "attn_allowed":
            yield compare(f"expect/{name}", found.get(name), theirs, gates.ce if name == "ce" else gates.hidden)
    for number, norm in enumerate(run.case.about.get("layer_output_norms", ())):
        yield compare(f"norm of layer {number}", _norm(found.get(f"layer{number}")), norm, gates.hidden)


def _loss_rows(run: TrainRun, losses: Losses, gates: Gates) -> Iterator[Row]:
    """The reduced losses."""
    ours = {"ce": losses.ce, "mse": losses.mse, "loss": losses.total}
    for name, theirs in run.case.entry("loss").get("f32_flex", {}).items():
        yield compare(f"reduced {name}", ours[name], theirs, gates.reduced_mse if name == "mse" else gates.reduced_ce)


def _gradient_rows(case: Case, found: dict[str, Tensor], gates: Gates) -> Iterator[Row]:
    """Gradients of a selection, the norms of all that are no rounding, and zeros where nothing is learnt."""
    noise, norms = set(case.entry("grads_roundoff_only")), case.entry("grad_norms_f64")
    for name, theirs in case.tensors("grad").items():
        if name not in noise:
            yield compare(f"grad/{name}", found.get(name, torch.zeros_like(theirs)), theirs, gates.gradient)
    total = case.entry("grad_total_norm_f64")
    judged = {name: norm for name, norm in norms.items() if norm and norm > SMALL_NORM * total and name not in noise}
    norm_rows = [compare(name, _norm(found.get(name)), norm, gates.gradient) for name, norm in judged.items()]
    ours = [norm for name, x in found.items() if name not in noise and (norm := _norm(x)) is not None]
    yield from filter(None, [worst("gradient norms", norm_rows)])
    yield compare("gradient norm, total", float(torch.tensor(ours, dtype=torch.float64).norm()), total, gates.gradient)
    idle = [*case.entry("grads_none"), *case.entry("grads_exactly_zero")]
    zero_rows = [compare(name, float(found[name].abs().max()), 0.0, gates.exact) for name in idle if name in found]
    yield from filter(None, [worst("gradients that are zero", zero_rows)])


def _norm(x: Tensor | None) -> float | None:
    return None if x is None else float(x.double().norm())

"""`srum_*` cases with a model: reward-weighted flow loss with one or two targets, its gradients, and a trace of steps.

The batch of such a case holds maps over pixels as the released code computed them; they are pooled to tokens, weighted
and trained on by the code that training uses.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabagel.config.load import override
from megabagel.config.schema import Config, RewardConfig, TrainConfig
from megabagel.errors import UserError
from megabagel.parallel.attention import choose_attention
from megabagel.parallel.mesh import Mesh
from megabagel.parity.capture import Watch, visible
from megabagel.parity.case import Case, model_config, open_case
from megabagel.parity.comparisons import Gates, Row, compare, worst
from megabagel.parity.gather import gather_gradients, gather_weights
from megabagel.parity.machine import load_weights
from megabagel.parity.packs import OfficialBatch, fixed_noise, packed_batch
from megabagel.parity.train_case import SMALL_NORM, case_config
from megabagel.rewards.weights import floored, pooled
from megabagel.sequence.items import Item, Latent, Text
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import build_pack
from megabagel.sequence.rank_rows import LatentWeights
from megabagel.sequence.sample import LATENT, TEXT, SamplePlan, lay_out
from megabagel.train.build_rank import Rank, build_rank
from megabagel.train.schedule import learning_rate
from megabagel.train.step import Counts

FEWEST_TOKENS = 128
"""Window of a case at least: the batches are so short that context-parallel ranks would not all get a row block."""

Found = tuple[list[Row], list[str]]
"""Rows (on rank 0) and notes."""


def is_trace(case: Case) -> bool:
    """Whether the case is several optimizer steps over other cases."""
    return "steps" in case.about


def srum_config(case: Case, overrides: list[str], ranks: int) -> Config:
    """Config of a run over the batches of a case, on `ranks` ranks."""
    if is_trace(case):
        # As the JSON says in words: lr 1e-3, betas 0.9 0.95, eps 1e-15, no decay, constant after 2 steps, clip 1.
        train = TrainConfig(
            steps=len(case.entry("steps")), packs_per_step=ranks, lr=1e-3, warmup=2, eps=1e-15, ema=0.0, clip=1.0
        )
        cases = _cases_at_hand(case)
        if not cases:
            raise UserError(f"{case.path}: none of the cases that its steps use lies beside it; copy them too")
    else:
        train, cases = TrainConfig(packs_per_step=ranks), [case]
    train = replace(train, ce_weight=1.0, mse_weight=1.0, timestep_shift=cases[0].config["timestep_shift"])
    config = case_config(cases[0], [reward_batch(one) for one in cases], train, [])
    source = replace(config.data.sources[0], task="reward")
    reward = RewardConfig(constraint=cases[0].config["lambda_constraint"], floor=None)
    data = replace(config.data, sources=(source,), max_tokens=max(config.data.max_tokens, FEWEST_TOKENS))
    config = replace(config, data=data, reward=reward)
    return override(config, overrides, str(case.path))


def reward_batch(case: Case) -> OfficialBatch:
    """The batch of a case, planned anew from its texts and images."""
    model, tensors = model_config(case), case.tensors("batch")
    plans = list(_plans(case, tensors, model.latent_stride))
    latents = sum(int((plan.kind_S == LATENT).sum()) for plan in plans)
    for name in ("packed_timesteps", "noise"):
        if len(tensors[name]) != latents:
            raise UserError(f"{case.path}: batch/{name} has {len(tensors[name])} rows, its samples make {latents}")
    return OfficialBatch(build_pack(plans), tensors)


def _plans(case: Case, tensors: dict[str, Tensor], stride: int) -> Iterator[SamplePlan]:
    """One plan per sample: its texts and images in the order in which their delimiters stand in the sequence."""
    special = case.entry("special_tokens")
    words, at = tensors["packed_text_ids"].tolist(), 0
    shapes, times = tensors["patchified_vae_latent_shapes"].tolist(), tensors["packed_timesteps"]
    image = token = 0
    for number, length in enumerate(tensors["sample_lens"].tolist()):
        items: list[Item] = []
        draws, left = [], length
        while left > 0:
            if words[at] == special["start_of_image"]:
                rows, cols = shapes[image]
                draws.append(float(times[token]))
                items.append(Latent(len(items), rows, cols, noised=draws[-1] != -np.inf))
                at, image, token, left = at + 2, image + 1, token + rows * cols, left - rows * cols - 2
            else:
                end = words.index(special["eos_token_id"], at)
                items.append(Text(len(items), end - at - 1))
                at, left = end + 1, left - (end + 1 - at)
        plan = lay_out(items, SampleKey(0, case.name, number, 0), ())
        plan.latents = [replace(one, raw_timestep=draw) for one, draw in zip(plan.latents, draws, strict=True)]
        yield plan


def batch_weights(batch: OfficialBatch, rules: RewardConfig) -> LatentWeights:
    """Weights of the batch's latent tokens from its maps over pixels; without maps the plain flow loss alone."""
    maps, images = batch.tensors.get("reward_map"), batch.pack.latents
    tokens = [image.rows * image.cols for image in images]
    if maps is None:
        return LatentWeights(np.zeros(sum(tokens), np.float32), np.ones(sum(tokens), np.float32))
    # One map per latent image, or one per generated one.
    judged = images if len(maps) == len(images) else [image for image in images if image.noised]
    rewards = iter(
        floored(pooled(map_hw.numpy(), (image.rows, image.cols), rules.pooling).reshape(-1), rules)
        for image, map_hw in zip(judged, maps, strict=True)
    )
    flow, second = [], []
    for image, count in zip(images, tokens, strict=True):
        found = next(rewards) if image in judged else None
        flow.append(np.zeros(count, np.float32) if found is None else found.reward_L)
        second.append(np.full(count, 0.0 if found is None else found.constraint, np.float32))
    return LatentWeights(np.concatenate(flow), np.concatenate(second))


def compare_srum(case: Case, config: Config, mesh: Mesh, gates: Gates) -> Found:
    """Run the batch forward and backward and compare everything. Called on all ranks.

    Args:
        case: a `srum_*` case with a batch, regions and scores.
        config: of a run over it.
        mesh: grid of the job.
        gates: largest differences that pass.
    """
    rank, batch = build_rank(config, mesh, choose_attention(config)), reward_batch(case)
    load_weights(rank, open_case(case.path.with_name(case.entry("weights_from").partition(" ")[0])))
    packed = packed_batch(batch, rank.batches, batch_weights(batch, config.reward))
    inputs = rank.builder.build(packed, fixed_noise(batch, config.model))
    copies = rank.runner.fewest_micro_batches
    times = copies * mesh.dp.size
    watch = Watch(rank, packed, inputs)
    with watch.watching():
        losses = rank.runner.backward([inputs] * copies, [Counts(0, batch.pack.mse_tokens * times)] * copies)
    found, gradients = watch.whole(), gather_gradients(rank)
    if not mesh.world.first:
        return [], []
    rows = [*_plan_rows(case, batch, packed, gates), *_token_rows(case, batch, found, times, gates)]
    rows.append(compare("loss", losses.mse, case.entry("loss_f32"), gates.reduced_mse))
    if "loss_f64" in case.about:
        rows.append(compare("loss in fp64", losses.mse, case.about["loss_f64"], gates.reduced_mse))
    rows += _gradient_rows(case, gradients, gates)
    return rows, []


def _plan_rows(case: Case, batch: OfficialBatch, packed: Any, gates: Gates) -> Iterator[Row]:
    pack = batch.pack
    ours = {
        "sample_lens": [sample.tokens for sample in pack.samples],
        "packed_position_ids": pack.position_S,
        "packed_text_indexes": np.flatnonzero(pack.kind_S == TEXT),
        "packed_vae_token_indexes": np.flatnonzero(pack.kind_S == LATENT),
        "mse_loss_indexes": np.flatnonzero(pack.noised_S),
    }
    for name, values in ours.items():
        yield compare(f"batch/{name}", torch.as_tensor(values), batch.tensors[name], gates.exact)
    yield compare("batch/attn_allowed", visible(packed), batch.tensors["attn_allowed"], gates.exact)


def _token_rows(case: Case, batch: OfficialBatch, found: dict[str, Tensor], times: int, gates: Gates) -> Iterator[Row]:
    """Velocities, their gradients and token rewards, of the tokens with a loss or of all latent tokens."""
    noised_L = torch.from_numpy(batch.pack.noised_S[batch.pack.kind_S == LATENT])
    ours = {"expect/v": found["v"], "expect/reward_tokens": found["weight"], "grad/v": found["grad/v"] * times}
    for name, values in ours.items():
        group, _, key = name.partition("/")
        theirs = case.tensors(group).get(key)
        if theirs is not None:
            mine = values if len(theirs) == len(values) else values[noised_L]
            yield compare(name, mine, theirs, gates.gradient if group == "grad" else gates.hidden)


def _gradient_rows(case: Case, found: dict[str, Tensor], gates: Gates) -> Iterator[Row]:
    for name, theirs in case.tensors("grad").items():
        if name != "v":
            yield compare(f"grad/{name}", found.get(name, torch.zeros_like(theirs)), theirs, gates.gradient)
    total, norms = case.entry("grad_total_norm"), case.entry("grad_norms")
    own = {name: float(x.double().norm()) for name, x in found.items()}
    judged = {name: norm for name, norm in norms.items() if norm and norm > SMALL_NORM * total}
    yield from filter(
        None, [worst("gradient norms", [compare(n, own.get(n), norm, gates.gradient) for n, norm in judged.items()])]
    )
    ours = float(torch.tensor(list(own.values()), dtype=torch.float64).norm())
    yield compare("gradient norm, total", ours, total, gates.gradient)


def _cases_at_hand(case: Case) -> list[Case]:
    """The cases of the first steps, up to one whose files are absent."""
    found = []
    for step in case.entry("steps"):
        path = case.path.with_name(f"{step['case']}.safetensors")
        if not path.is_file():
            break
        found.append(open_case(path))
    return found


def compare_srum_trace(case: Case, config: Config, mesh: Mesh, gates: Gates) -> Found:
    """Train the steps of the trace whose batches are at hand. Called on all ranks.

    Args:
        case: a trace, which names the cases of its batches.
        config: of a run over them.
        mesh: grid of the job.
        gates: largest differences that pass.
    """
    rank, cases = build_rank(config, mesh, choose_attention(config)), _cases_at_hand(case)
    load_weights(rank, open_case(case.path.with_name(case.entry("weights_from").partition(" ")[0])))
    first, rows = gather_weights(rank, "weight"), []
    for number, (step, one) in enumerate(zip(case.entry("steps"), cases, strict=False)):
        loss, norm, rate = _step(rank, one, number, mesh)
        rows += [
            compare(f"step {number + 1}: loss", loss, step["loss"], gates.reduced_mse),
            compare(f"step {number + 1}: gradient norm", norm, step["grad_norm"], gates.gradient),
            compare(f"step {number + 1}: lr", rate, step["lr"], gates.block),
        ]
    last = gather_weights(rank, "weight")
    if not mesh.world.first:
        return [], []
    if len(cases) < len(case.entry("steps")):
        absent = case.entry("steps")[len(cases)]["case"]
        return rows, [f"steps from {len(cases) + 1} on did not run: {absent} does not lie beside this case"]
    for name, theirs in case.tensors("expect_param").items():
        update = float((theirs - first[name]).double().norm())
        rows.append(compare(f"expect_param/{name}", last[name], theirs, gates.update, scale=update))
    return rows, []


def _step(rank: Rank, case: Case, number: int, mesh: Mesh) -> tuple[float, float, float]:
    """One optimizer step on a case's batch, the same on every data-parallel rank: loss, gradient norm, rate."""
    batch = reward_batch(case)
    rules = replace(rank.config.reward, constraint=case.config["lambda_constraint"])
    packed = packed_batch(batch, rank.batches, batch_weights(batch, rules))
    inputs = rank.builder.build(packed, fixed_noise(batch, rank.config.model))
    copies, rate = rank.runner.fewest_micro_batches, learning_rate(rank.config.train, number)
    counts = Counts(0, batch.pack.mse_tokens * copies * mesh.dp.size)
    losses, norm = rank.runner.train([inputs] * copies, [counts] * copies, rate)
    return losses.mse, norm, rate

"""A `trace_*` case: several optimizer steps, and the weights and averages that they end with."""

from collections.abc import Iterator

import torch

from megabagel.config.schema import Config, TrainConfig
from megabagel.errors import UserError
from megabagel.parallel.attention import choose_attention
from megabagel.parallel.mesh import Mesh
from megabagel.parity.case import Case, model_config, open_case
from megabagel.parity.comparisons import Gates, Row, compare, worst
from megabagel.parity.gather import gather_weights
from megabagel.parity.machine import load_weights
from megabagel.parity.packs import OfficialBatch, fixed_noise, official_batch, packed_batch
from megabagel.parity.train_case import case_config, freeze_sets
from megabagel.train.build_rank import Rank, build_rank
from megabagel.train.schedule import learning_rate
from megabagel.train.step import Losses, denominators

RULES = ("micro_step", "global_batch")


def trace_config(case: Case, overrides: list[str]) -> Config:
    """The config of a trace: `train.loss_normalization` is ours unless an override says otherwise."""
    optimizer, schedule = case.entry("optimizer"), case.entry("scheduler")
    train = TrainConfig(
        steps=schedule["total_steps"],
        packs_per_step=len(_order(case)[0]),
        lr=optimizer["lr"],
        min_lr=schedule["min_lr"],
        schedule=schedule["name"],
        warmup=schedule["warmup_steps"],
        beta1=optimizer["betas"][0],
        beta2=optimizer["betas"][1],
        eps=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        clip=optimizer["max_grad_norm"],
        ema=case.entry("ema_decay"),
        ce_weight=case.entry("ce_weight"),
        mse_weight=case.entry("mse_weight"),
        timestep_shift=case.entry("timestep_shift"),
        freeze=freeze_sets(case),  # type: ignore[arg-type]
    )
    return case_config(case, list(_batches(case).values()), train, overrides)


def rule_of(case: Case) -> str:
    """The loss normalization that a trace was computed with."""
    return case.about.get("loss_normalisation", "micro_step")


def compare_trace(case: Case, config: Config, mesh: Mesh, gates: Gates) -> list[Row]:
    """Train the steps of the trace and compare losses, gradient norms and weights. Called on all ranks.

    Args:
        case: a trace of the official trainer.
        config: from `trace_config`.
        mesh: grid of the job.
        gates: allowed differences.

    Returns:
        Rows on rank 0, nothing on other ranks.
    """
    _check_ranks(case, config, mesh.dp.size)
    machine, batches = build_rank(config, mesh, choose_attention(config)), _batches(case)
    if not machine.builder.attention.has_backward:
        raise UserError(
            f"{case.path}: a trace trains, but attention engine {config.parallel.attention} has no backward here"
        )
    load_weights(machine, open_case(case.path.with_name(case.entry("init_weights_from"))))
    first = gather_weights(machine, "weight")
    rows: list[Row] = []
    for number, order in enumerate(_order(case)):
        losses, norm = _step(machine, [batches[name] for name in order], number)
        rows += _step_rows(case, config, number, losses, norm, gates)
    weights, averages = gather_weights(machine, "weight"), gather_weights(machine, "ema")
    if not mesh.world.first:
        return []
    return rows + list(_weight_rows(case, first, weights, averages, gates))


def _order(case: Case) -> list[list[str]]:
    """Names of the packs of each step, micro-step by micro-step."""
    return [[name for micro in step for name in micro] for step in case.entry("plan_list")]


def _batches(case: Case) -> dict[str, OfficialBatch]:
    """The batches that the trace uses, by name of the case that holds them."""
    names = sorted({name for step in _order(case) for name in step})
    return {name: official_batch(open_case(case.path.with_name(name)), model_config(case)) for name in names}


def _check_ranks(case: Case, config: Config, dp: int) -> None:
    """By the official rule a step depends on the number of data-parallel ranks."""
    ranks = len(case.entry("plan_list")[0][0])
    if config.train.loss_normalization == "micro_step" and dp != ranks:
        raise UserError(
            f"{case.path}: by train.loss_normalization=micro_step a step depends on the data-parallel size, {ranks} in "
            f"this trace; found {dp}. Start {ranks} times the ranks of one replica (--nproc), or leave the option out."
        )


def _step(machine: Rank, batches: list[OfficialBatch], number: int) -> tuple[Losses, float]:
    """One optimizer step; every data-parallel rank takes its turn of the packs."""
    config, dp = machine.config, machine.mesh.dp
    inputs = [
        machine.builder.build(packed_batch(batch, machine.batches), fixed_noise(batch, config.model))
        for batch in batches[dp.rank :: dp.size]
    ]
    packs = [batch.pack for batch in batches]
    counts = denominators(config.train, [packs[turn : turn + dp.size] for turn in range(0, len(packs), dp.size)])
    return machine.runner.train(inputs, counts, learning_rate(config.train, number))


def _step_rows(case: Case, config: Config, number: int, losses: Losses, norm: float, gates: Gates) -> Iterator[Row]:
    expected = case.entry("steps_f64")[number]
    for name, gate in (("ce", gates.reduced_ce), ("mse", gates.reduced_mse)):
        parts = [micro[name] for micro in expected["micro"]]
        whole = sum(parts) if rule_of(case) == "global_batch" else sum(parts) / len(parts)
        yield compare(f"step {number + 1}: {name}", getattr(losses, name), whole, gate)
    yield compare(f"step {number + 1}: gradient norm", norm, expected["grad_norm"], gates.gradient)
    yield compare(f"step {number + 1}: lr", learning_rate(config.train, number), expected["lr"], gates.block)


def _weight_rows(
    case: Case,
    first: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    averages: dict[str, torch.Tensor],
    gates: Gates,
) -> Iterator[Row]:
    """Final weights and averages; differences are judged by the size of the update, not of the weights."""
    noise = set(case.entry("update_is_roundoff_only"))
    for prefix, ours in (("expect_param", weights), ("expect_ema", averages)):
        for name, theirs in case.tensors(prefix).items():
            if name not in noise:
                update = float((theirs - first[name]).double().norm())
                yield compare(f"{prefix}/{name}", ours.get(name, first[name]), theirs, gates.update, scale=update)
    updates = case.about.get("update_norms_f64", {})
    for prefix, ours in (("final_param_norms_f64", weights), ("final_ema_norms_f64", averages)):
        rows = [
            compare(name, float(ours.get(name, first[name]).double().norm()), norm, gates.update, scale=updates[name])
            for name, norm in case.about.get(prefix, {}).items()
            if norm is not None and name in first and updates.get(name) and name not in noise
        ]
        yield from filter(None, [worst(prefix, rows)])
    moved = [
        compare(name, float((weights[name] - first[name]).double().norm()), norm, gates.update)
        for name, norm in updates.items()
        if norm and name in first and name not in noise
    ]
    yield from filter(None, [worst("update_norms_f64", moved)])

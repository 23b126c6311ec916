"""A training run from config to checkpoint: join the job, build everything, step until done."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megabagel.checkpoint import store
from megabagel.checkpoint.tensors import optimizer_shards, sharded_tensors
from megabagel.config.load import dump
from megabagel.config.schema import Config
from megabagel.data.decode import choose_engine
from megabagel.data.loader import Loader, Step
from megabagel.data.plan import GlobalPlan, Source, open_sources
from megabagel.data.shapes import ensure_dataset
from megabagel.data.tokenizer import TextTokenizer, load_tokenizer
from megabagel.errors import UserError
from megabagel.generate.euler import EulerSampler
from megabagel.model.vae import build_codec
from megabagel.parallel import host
from megabagel.parallel.agree import everywhere, once, union
from megabagel.parallel.attention import AttentionEngine, choose_attention
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.linears import MegatronLayers
from megabagel.parallel.megatron import megatron_config
from megabagel.parallel.stages import build_stages
from megabagel.parallel.topology import Topology, distributed
from megabagel.sequence.batch import Encoders
from megabagel.train.optimizer import Optimizer
from megabagel.train.schedule import learning_rate
from megabagel.train.step import Losses, StepRunner, denominators
from megabagel.train.telemetry import Telemetry
from megabagel.train.throughput import peak_flops, rates

logger = logging.getLogger(__name__)

SAID_ONCE = ("megabagel.data.index", "megabagel.data.index_cache", "megabagel.data.plan")
"""Loggers of what every rank finds alike: rank 0 speaks for all."""


@dataclass
class Trainer:
    """Everything one rank needs to train, built from a config on a topology."""

    config: Config
    topology: Topology
    plan: GlobalPlan
    loader: Loader
    optimizer: Optimizer
    runner: StepRunner
    builder: InputBuilder
    sampler: EulerSampler | None
    step: int = 0
    """Finished steps."""
    lost_images: int = 0
    """Images of the whole job that could not be decoded in them."""

    def train_step(self, step: Step) -> tuple[Losses, float]:
        """One optimizer step; returns (losses, gradient norm)."""
        inputs = [self.builder.build(batch) for batch in step.batches]
        counts = denominators(self.config.train, step.plan.micro_steps(self.topology.dp.size))
        result = self.runner.train(inputs, counts, learning_rate(self.config.train, self.step))
        self.step += 1
        return result

    def tensors(self) -> dict[str, Any]:
        """This rank's shards, as a checkpoint holds them."""
        stages = [chunk.module for chunk in self.optimizer.chunks]
        shards = optimizer_shards(self.optimizer.distributed, self.optimizer.ema)
        return sharded_tensors(stages, shards, self.topology)

    def save(self, plan_state: dict[str, Any]) -> None:
        """Write a checkpoint of the finished steps; `plan_state` is the data plan's after the last of them."""
        store.save(
            self.config, self.topology, self.step, self.tensors(), {"plan": plan_state, "lost_images": self.lost_images}
        )

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint, whatever grid wrote it."""
        self.step, state = everywhere(self.topology, lambda: store.read(folder, self.config))
        everywhere(self.topology, lambda: self.plan.load_state(state["plan"]))
        store.load(folder, self.tensors())
        self.optimizer.after_load(self.step)
        self.lost_images = state["lost_images"]
        logger.info("resumed from %s at step %d", folder, self.step)

    def start_from(self, folder: Path) -> None:
        """Take the weights of another run, or imported ones, for step 0; averages start from them."""
        tensors = self.tensors()
        store.load(folder, everywhere(self.topology, lambda: store.weights_of(folder, self.config, tensors)))
        self.optimizer.after_load(0)
        self.optimizer.start_averages()
        logger.info("weights from %s (%s)", folder, self.config.run.init_weights)


def build_trainer(config: Config, topology: Topology) -> Trainer:
    """Open the data and build the model, optimizer and engines of this rank.

    Raises UserError, the same on every rank, for whatever a user can mend.
    """
    once(topology, lambda: ensure_dataset(config.data))
    tokenizer = everywhere(topology, lambda: _tokenizer(config))
    opened: list[list[Source]] = []
    once(topology, lambda: opened.append(open_sources(config, tokenizer)))  # writes the cache that the others read
    sources = everywhere(topology, lambda: opened[0] if opened else open_sources(config, tokenizer))
    plan = everywhere(topology, lambda: GlobalPlan(sources, config))
    codec = everywhere(topology, lambda: build_codec(config.model.vae, host.device()))
    attention = everywhere(topology, lambda: _attention(config))
    encoders = Encoders(topology.pp.first, topology.cp.rank, topology.cp.size, topology.tp_cp.rank, topology.tp_cp.size)
    dp = (topology.dp.rank, topology.dp.size)
    loader = Loader(plan, tokenizer, choose_engine(config.data.decode), config, encoders, dp)
    megatron = megatron_config(config)
    optimizer = Optimizer(config.train, megatron, build_stages(config, topology, megatron), topology)
    runner = StepRunner(config, topology, optimizer)
    builder = InputBuilder(config, topology, MegatronLayers(megatron, topology), codec, host.device(), attention)
    sampler = None
    if config.telemetry.sample_every:
        sampler = everywhere(topology, lambda: EulerSampler(config, topology, builder, tokenizer, runner.evaluate))
    return Trainer(config, topology, plan, loader, optimizer, runner, builder, sampler)


def _attention(config: Config) -> AttentionEngine:
    engine = choose_attention(config)
    if not engine.has_backward:
        raise UserError(
            f"parallel.attention={engine.name} has no backward on a CPU, so nothing can be trained with it: use host"
        )
    return engine


def _tokenizer(config: Config) -> TextTokenizer:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab:
        raise UserError(
            f"model.vocab={config.model.vocab}, but data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} "
            "tokens: set model.vocab to at least that, a multiple of parallel.tp"
        )
    return tokenizer


def main(config: Config) -> None:
    """Train `config` on the ranks of this job; called once per rank."""
    with distributed(config) as topology:
        _configure_log(topology)
        logger.info("grid: %s, %s on %s", topology.describe(), config.train.precision, host.backend())
        folder = Path(config.run.dir)
        once(topology, lambda: _prepare(config, folder))
        trainer = build_trainer(config, topology)
        checkpoint = everywhere(topology, lambda: store.find(config))
        if checkpoint is not None:
            trainer.resume(checkpoint)
        elif config.run.init_from:
            trainer.start_from(Path(config.run.init_from))
        first = topology.world.first
        telemetry = everywhere(topology, lambda: Telemetry(config, first=first, step=trainer.step))
        try:
            _loop(trainer, telemetry)
        finally:
            telemetry.close()


def _loop(trainer: Trainer, telemetry: Telemetry) -> None:
    config = trainer.config
    peak = peak_flops(config, host.device())
    logger.info("peak for MFU: %.3g FLOP/s per rank (%s)", *peak)
    left = config.train.steps - trainer.step
    for step in in_step(trainer.topology, trainer.loader.steps(left)):
        started = time.perf_counter()
        losses, norm = trainer.train_step(step)
        trainer.lost_images += len(union(trainer.topology, step.lost))
        record = _record(trainer, step, losses, norm)
        seconds = time.perf_counter() - started
        flops = sum(step.plan.flops[1:], step.plan.flops[0])
        speed = rates(flops, record["tokens"], seconds, trainer.topology.world.size, peak)
        record |= {"seconds": seconds, **speed, "mem": host.peak_memory()}
        once(trainer.topology, partial(telemetry.log_step, record))
        done = trainer.step == config.train.steps
        if trainer.sampler and (done or trainer.step % config.telemetry.sample_every == 0):
            once(trainer.topology, partial(telemetry.log_images, trainer.step, trainer.sampler.draw()))
        if done or (config.checkpoint.every and trainer.step % config.checkpoint.every == 0):
            trainer.save(step.plan.state)


def in_step(topology: Topology, steps: Iterator[Step]) -> Iterator[Step]:
    """The steps while every rank has its share of the next one. A rank without (a shard is gone) ends all of them."""
    while (step := everywhere(topology, lambda: next(steps, None))) is not None:
        yield step


def _record(trainer: Trainer, step: Step, losses: Losses, norm: float) -> dict[str, Any]:
    """What a step did, equal on every grid up to rounding: the first part of its line in metrics.jsonl."""
    plan = step.plan
    by_source: dict[str, float] = {}
    counts = plan.tokens_by_source()
    for number, source in enumerate(trainer.config.data.sources):
        ce, mse = counts.get(source.name, (0, 0))
        ce_sum, mse_sum = losses.sums[:, :, number].sum(0).tolist()
        by_source |= {f"loss_ce/{source.name}": ce_sum / ce} if ce else {}
        by_source |= {f"loss_mse/{source.name}": mse_sum / mse} if mse else {}
    tokens, gen = sum(pack.tokens for pack in plan.packs), sum(pack.tokens_gen for pack in plan.packs)
    return {
        "step": trainer.step,
        "loss": losses.total,
        "loss_ce": losses.ce,
        "loss_mse": losses.mse,
        **by_source,
        "grad_norm": norm,
        "lr": learning_rate(trainer.config.train, trainer.step - 1),
        "tokens": tokens,
        "tokens_und": tokens - gen,
        "tokens_gen": gen,
        "samples": sum(len(pack.samples) for pack in plan.packs),
        "skipped": sum(plan.skipped.values()),
        "lost_images": trainer.lost_images,
    }


def _prepare(config: Config, folder: Path) -> None:
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # rather now than at the first checkpoint
        dump(config, folder / "config.yaml")
    except OSError as error:
        raise UserError(
            f"run.dir={folder}: cannot be written ({error}); choose a folder with space and rights"
        ) from error


def _configure_log(topology: Topology) -> None:
    level = logging.INFO if topology.world.first else logging.WARNING
    logging.basicConfig(
        level=level, format=f"[rank {topology.world.rank}] %(message)s" if level > 20 else "%(message)s"
    )
    logging.getLogger("megabagel").setLevel(level)
    for name in SAID_ONCE:
        logging.getLogger(name).setLevel(level if topology.world.first else logging.ERROR)

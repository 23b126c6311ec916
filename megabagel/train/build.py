"""From a config to a trainer: opens the data, chooses the engines, builds the model and the optimizer of this rank.

What fails for a user's mistake fails on every rank with the same UserError.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megabagel.checkpoint.saver import Saver
from megabagel.config.schema import Config
from megabagel.data.decode import DecodeEngine, choose_engine
from megabagel.data.latents import LatentCache, open_latents
from megabagel.data.loader import Loader
from megabagel.data.plan import GlobalPlan, Source, open_sources
from megabagel.data.shapes import ensure_dataset
from megabagel.data.tokenizer import TextTokenizer, load_tokenizer
from megabagel.errors import UserError
from megabagel.generate.euler import EulerSampler
from megabagel.model.vae import build_codec, codec_fingerprint
from megabagel.parallel import host
from megabagel.parallel.agree import everywhere, once
from megabagel.parallel.attention import AttentionEngine, choose_attention
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.kernels import choose_kernels
from megabagel.parallel.linears import MegatronLayers
from megabagel.parallel.megatron import megatron_config
from megabagel.parallel.plans import Planner
from megabagel.parallel.stages import build_stages
from megabagel.parallel.topology import Topology
from megabagel.sequence.batch import Encoders
from megabagel.train.judge import StepJudge
from megabagel.train.optimizer import Optimizer
from megabagel.train.step import StepRunner
from megabagel.train.trainer import Trainer


@dataclass(frozen=True)
class Data:
    """Where batches come from."""

    sources: Sequence[Source]
    tokenizer: TextTokenizer
    decode: DecodeEngine
    latents: LatentCache | None


def open_data(config: Config, topology: Topology) -> Data:
    """Index the sources of a config and choose how they are read. Raises UserError."""
    data = config.data
    once(topology, lambda: ensure_dataset(data))
    tokenizer = everywhere(topology, lambda: _tokenizer(config))
    opened: list[list[Source]] = []
    once(topology, lambda: opened.append(open_sources(config, tokenizer)))  # writes the cache that the others read
    sources = everywhere(topology, lambda: opened[0] if opened else open_sources(config, tokenizer))
    decode = everywhere(topology, lambda: choose_engine(data.decode, host.device(), data.decode_threads, data.workers))
    return Data(sources, tokenizer, decode, everywhere(topology, lambda: _latents(config, sources)))


def build_trainer(config: Config, topology: Topology, data: Data | None = None, draw: bool = True) -> Trainer:
    """The trainer of this rank; `data` are those of the config by default. Raises UserError.

    Without `draw` its weights are for a checkpoint to fill: none are drawn.
    """
    data = data or open_data(config, topology)
    plan = everywhere(topology, lambda: GlobalPlan(data.sources, config))
    codec = everywhere(topology, lambda: build_codec(config.model.vae, host.device()))
    attention = everywhere(topology, lambda: _attention(config))
    kernels = everywhere(topology, lambda: choose_kernels(config))
    encoders = Encoders(topology.pp.first, topology.cp.rank, topology.cp.size, topology.tp_cp.rank, topology.tp_cp.size)
    dp = (topology.dp.rank, topology.dp.size)
    planner = Planner.of(config, topology, attention)
    loader = Loader(plan, data.tokenizer, data.decode, config, encoders, dp, planner, data.latents)
    megatron = megatron_config(config)
    stages = build_stages(config, topology, megatron, kernels, draw)
    optimizer = Optimizer(config.train, megatron, stages, topology)
    runner = StepRunner(config, topology, optimizer)
    factory = MegatronLayers(megatron, topology, kernels)
    builder = InputBuilder(config, topology, factory, codec, host.device(), attention)
    sampler = None
    if config.telemetry.sample_every:
        sampler = everywhere(topology, lambda: EulerSampler(config, topology, builder, data.tokenizer, runner.evaluate))
    saver, judge = Saver(config, topology), StepJudge(config.train)
    return Trainer(config, topology, plan, loader, optimizer, runner, builder, sampler, saver, judge)


def _attention(config: Config) -> AttentionEngine:
    engine = choose_attention(config)
    if not engine.has_backward:
        raise UserError(
            f"parallel.attention={engine.name} has no backward on a CPU, so nothing can be trained with it: use host"
        )
    return engine


def _latents(config: Config, sources: Sequence[Source]) -> LatentCache | None:
    if config.data.latents is None:
        return None
    return open_latents(Path(config.data.latents), config, sources, codec_fingerprint(config.model.vae))


def _tokenizer(config: Config) -> TextTokenizer:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab:
        raise UserError(
            f"model.vocab={config.model.vocab}, but data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} "
            "tokens: set model.vocab to at least that, a multiple of parallel.tp"
        )
    return tokenizer

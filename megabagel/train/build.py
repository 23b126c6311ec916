"""Trainer from a config: open the data, choose the engines, build model and optimizer of this rank.

Everything that a user's mistake can make fail runs inside `on_all_ranks`: the same UserError is raised on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megabagel.checkpoint.saver import Saver
from megabagel.config.schema import Config
from megabagel.data.builders.toy_shapes import ensure_dataset
from megabagel.data.decode import DecodeEngine, choose_engine
from megabagel.data.load.collate import Filler
from megabagel.data.load.latents import LatentCache, open_latents
from megabagel.data.load.loader import Loader
from megabagel.data.plan.global_plan import GlobalPlan, Source, open_sources
from megabagel.data.tokenize.tokenizer import TextTokenizer, load_tokenizer
from megabagel.errors import UserError
from megabagel.model.vae import build_codec, codec_fingerprint
from megabagel.parallel.attention import AttentionEngine, choose_attention
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.collective_errors import on_all_ranks, on_rank0, require_equal
from megabagel.runtime.device import current_device
from megabagel.sequence.batch import BatchBuilder
from megabagel.train.anomaly import LossSpikeDetector
from megabagel.train.build_rank import build_rank
from megabagel.train.held_out import HeldOut, held_out_config
from megabagel.train.memory_check import check_memory
from megabagel.train.sample_images import SamplerFactory
from megabagel.train.step import ForwardRunner
from megabagel.train.trainer import Trainer


@dataclass(frozen=True)
class Data:
    """Opened data of a run: indexed sources, tokenizer, decoding engine and the optional latent cache."""

    sources: Sequence[Source]
    tokenizer: TextTokenizer
    decode: DecodeEngine
    latents: LatentCache | None


def open_data(config: Config) -> Data:
    """Index the sources of a config and choose how they are read.

    Raises:
        UserError: a source or the tokenizer is unusable, or ranks see different contents of them.
    """
    data = config.data
    on_rank0(lambda: ensure_dataset(data))
    tokenizer = on_all_ranks(lambda: _tokenizer(config))
    opened: list[list[Source]] = []
    # Rank 0 first: it writes the index cache that the other ranks then read, instead of all indexing every shard.
    on_rank0(lambda: opened.append(open_sources(config, tokenizer)))
    sources = on_all_ranks(lambda: opened[0] if opened else open_sources(config, tokenizer))
    # A stale file on one host would give that rank other samples, without any error.
    contents = {f"contents of data.sources {source.name}": source.index.fingerprint for source in sources}
    require_equal({"data.tokenizer's contents": tokenizer.fingerprint(), **contents})
    decode = on_all_ranks(lambda: choose_engine(data.decode, current_device(), data.decode_threads, data.workers))
    return Data(sources, tokenizer, decode, on_all_ranks(lambda: _latents(config, sources)))


def build_trainer(
    config: Config,
    mesh: Mesh,
    data: Data | None = None,
    draw: bool = True,
    samplers: SamplerFactory | None = None,
) -> Trainer:
    """Build the trainer of this rank.

    Args:
        config: the run.
        mesh: process groups of the job.
        data: opened data; by default that of the config.
        draw: whether to draw initial weights; False where a checkpoint will fill them.
        samplers: builds the sampler of `telemetry`; needed with telemetry.sample_every > 0.

    Raises:
        UserError: on every rank alike.
    """
    # First: a model that is too large must be refused before any of it is allocated.
    on_all_ranks(lambda: check_memory(config, current_device(), mesh.dp.size * mesh.cp.size))
    data = data or open_data(config)
    plan = on_all_ranks(lambda: GlobalPlan(data.sources, config))
    codec = on_all_ranks(lambda: build_codec(config.model.vae, current_device()))
    attention = on_all_ranks(lambda: _attention(config))
    rank = build_rank(config, mesh, attention, codec, draw)
    dp = (mesh.dp.rank, mesh.dp.size)
    loader = Loader(plan, data.tokenizer, data.decode, config, rank.batches, dp, data.latents)
    sampler = None
    if config.telemetry.sample_every:
        assert samplers is not None, "telemetry.sample_every > 0 needs a sampler"
        chunks = [stage.model for stage in rank.stages]
        sampler = on_all_ranks(lambda: samplers(config, mesh, chunks, data.tokenizer, rank.builder))
    saver, detector = Saver(config, mesh), LossSpikeDetector(config.train)
    held_out = build_held_out(config, mesh, attention, rank.builder, rank.runner) if config.train.val_every else None
    return Trainer(
        *(config, mesh, plan, loader, rank.optimizer, rank.runner, rank.builder, sampler, saver, detector),
        held_out=held_out,
    )


def build_held_out(
    config: Config, mesh: Mesh, attention: AttentionEngine, builder: InputBuilder, runner: ForwardRunner
) -> HeldOut:
    """Open the held-out set of a config.

    Args:
        config: names the set in `data.val_sources` and `train.val_packs`.
        mesh: process groups of the job.
        attention: engine of the run; its plan of a mask is made together with the batch.
        builder: input builder of the run.
        runner: of the weights to measure.

    Raises:
        UserError: on every rank alike.
    """
    held = held_out_config(config)
    data = open_data(held)
    plan = on_all_ranks(lambda: GlobalPlan(data.sources, held))
    batches = BatchBuilder(held, mesh.place, attention.plan)
    filler = Filler.of(plan, data.tokenizer, data.decode, batches, None)
    return HeldOut(held, mesh, plan, filler, builder, runner)


def _attention(config: Config) -> AttentionEngine:
    """Return the attention engine. Raises UserError for one without a backward pass."""
    engine = choose_attention(config)
    if not engine.has_backward:
        raise UserError(
            f"parallel.attention={engine.name} has no backward on a CPU, so nothing can be trained with it: use host"
        )
    return engine


def _latents(config: Config, sources: Sequence[Source]) -> LatentCache | None:
    """Return the latent cache that `data.latents` names, or None."""
    if config.data.latents is None:
        return None
    return open_latents(Path(config.data.latents), config, sources, codec_fingerprint(config.model.vae))


def _tokenizer(config: Config) -> TextTokenizer:
    """Return the tokenizer. Raises UserError if the embedding has fewer rows than it has ids."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab:
        raise UserError(
            f"model.vocab={config.model.vocab}, but data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} "
            "tokens: set model.vocab to at least that, a multiple of parallel.tp"
        )
    return tokenizer

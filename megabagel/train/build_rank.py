"""Assembly of one rank: model chunks, optimizer, batch builder and input builder.

Training, bench and parity build a whole `Rank`; the planner's dry run builds `RankWeights` on the meta device, with the
same code and without storage.
"""

import logging
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megabagel.config.schema import Config
from megabagel.model.kernels import TORCH, Kernels
from megabagel.model.vae import Codec
from megabagel.model.vit import splits
from megabagel.parallel.attention import AttentionEngine
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.kernels import choose_kernels
from megabagel.parallel.megatron import megatron_config
from megabagel.parallel.mesh import Mesh
from megabagel.parallel.stages import PipelineStage, build_stages
from megabagel.runtime.collective_errors import on_all_ranks
from megabagel.runtime.device import current_device
from megabagel.sequence.batch import BatchBuilder
from megabagel.train.optimizer import Optimizer
from megabagel.train.step import StepRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankWeights:
    """This rank's model chunks and the optimizer over them."""

    megatron: TransformerConfig
    stages: list[PipelineStage]
    optimizer: Optimizer


def build_weights(
    config: Config,
    mesh: Mesh,
    kernels: Kernels = TORCH,
    initialize: bool = True,
    device: torch.device | None = None,
) -> RankWeights:
    """Weights and optimizer of this rank.

    Args:
        config: the run, whose grid `mesh` is.
        mesh: this rank's place.
        kernels: the operations between the linears.
        initialize: fill weights with their keyed random numbers; without, a checkpoint has to.
        device: where they lie; None: this rank's device.
    """
    megatron = megatron_config(config)
    stages = build_stages(config, mesh, megatron, kernels, initialize, device)
    return RankWeights(megatron, stages, Optimizer(config.train, megatron, stages, mesh))


@dataclass(frozen=True)
class Rank:
    """One rank, ready to run steps."""

    config: Config
    mesh: Mesh
    stages: list[PipelineStage]
    optimizer: Optimizer
    runner: StepRunner
    batches: BatchBuilder
    """Builds packed batches from packs; the loader's workers get a copy."""
    builder: InputBuilder
    """Builds the inputs of a pipeline stage from packed batches."""


def build_rank(
    config: Config, mesh: Mesh, attention: AttentionEngine, codec: Codec | None = None, initialize: bool = True
) -> Rank:
    """Assemble this rank.

    Args:
        config: the run, whose grid `mesh` is.
        mesh: process groups of the job, and this rank's coordinates in them.
        attention: engine of the layers; its plan of a mask is made together with the batch.
        codec: image autoencoder; None where all latents are given from outside.
        initialize: see `build_weights`.

    Raises:
        UserError: on every rank alike.
    """
    kernels = on_all_ranks(lambda: choose_kernels(config))
    vit, tp = config.model.vit, mesh.tp.size
    if config.model.visual_und and mesh.pp.first and not splits(vit, tp):
        logger.info("ViT tower: whole on every rank (heads %d, ffn %d do not split over tp %d)", vit.heads, vit.ffn, tp)
    weights = build_weights(config, mesh, kernels, initialize)
    return Rank(
        config,
        mesh,
        weights.stages,
        weights.optimizer,
        StepRunner(config, mesh, weights.optimizer),
        BatchBuilder(config, mesh.place, attention.plan),
        InputBuilder(config, mesh, codec, current_device(), kernels, attention),
    )

"""What a training run is made of, without its data: the model on this rank's place, optimizer and step."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megabagel.checkpoint import store
from megabagel.checkpoint.official.files import TensorFiles
from megabagel.checkpoint.official.importer import import_tensors
from megabagel.checkpoint.tensors import optimizer_shards, sharded_tensors
from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.parallel import host
from megabagel.parallel.agree import everywhere, once
from megabagel.parallel.attention import choose_attention
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.kernels import choose_kernels
from megabagel.parallel.linears import MegatronLayers
from megabagel.parallel.megatron import megatron_config
from megabagel.parallel.stages import PipelineStage, build_stages
from megabagel.parallel.topology import Topology
from megabagel.parity.case import Case
from megabagel.sequence.batch import Encoders
from megabagel.train.optimizer import Optimizer
from megabagel.train.step import StepRunner


@dataclass(frozen=True)
class Machine:
    """One rank, ready to step."""

    config: Config
    topology: Topology
    stages: list[PipelineStage]
    optimizer: Optimizer
    runner: StepRunner
    builder: InputBuilder
    encoders: Encoders


def build_machine(config: Config, topology: Topology) -> Machine:
    """Build everything of `train.run` that a given batch needs, with keyed initial weights."""
    megatron, kernels, attention = megatron_config(config), choose_kernels(config), choose_attention(config)
    stages = build_stages(config, topology, megatron, kernels)
    optimizer = Optimizer(config.train, megatron, stages, topology)
    return Machine(
        config,
        topology,
        stages,
        optimizer,
        StepRunner(config, topology, optimizer),
        InputBuilder(config, topology, MegatronLayers(megatron, topology, kernels), None, host.device(), attention),
        Encoders(topology.pp.first, topology.cp.rank, topology.cp.size, topology.tp_cp.rank, topology.tp_cp.size),
    )


def load_weights(machine: Machine, case: Case) -> None:
    """Import the case's weights as `megabagel import-hf` does, and start from them as `run.init_from` does.

    Raises UserError on every rank when they do not fit.
    """
    if not case.weights:
        raise UserError(f"{case.path}: holds no weights; run it with --random-weights, or give the whole case")
    folders: list[str] = [tempfile.mkdtemp(prefix="megabagel-parity-")] if machine.topology.world.first else [""]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0]) / "imported"
    wanted = set(case.weights)
    files = TensorFiles(case.path, keep=wanted.__contains__)
    try:
        once(machine.topology, lambda: import_tensors(files, machine.config.model, folder))
        shards = optimizer_shards(machine.optimizer.distributed, {})
        tensors = sharded_tensors(machine.stages, shards, machine.topology)
        mine = everywhere(machine.topology, lambda: store.weights_of(folder, machine.config, tensors))
        everywhere(machine.topology, lambda: store.load(folder, mine))
    finally:
        dist.barrier()
        if machine.topology.world.first:
            shutil.rmtree(folders[0])
    machine.optimizer.after_load(0)
    machine.optimizer.start_averages()

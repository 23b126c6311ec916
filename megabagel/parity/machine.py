"""What a training run is made of, without its data: the model on this rank's place, optimizer and step."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megabagel.checkpoint import api
from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.checkpoint.hf.importer import import_tensors
from megabagel.checkpoint.tensors import optimizer_shards, sharded_tensors
from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.parallel.attention import choose_attention
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.kernels import choose_kernels
from megabagel.parallel.linears import MegatronLayers
from megabagel.parallel.megatron import megatron_config
from megabagel.parallel.mesh import Mesh
from megabagel.parallel.stages import PipelineStage, build_stages
from megabagel.parity.case import Case
from megabagel.runtime.collective_errors import everywhere, once
from megabagel.runtime.device import current_device
from megabagel.sequence.batch import Encoders
from megabagel.train.optimizer import Optimizer
from megabagel.train.step import StepRunner


@dataclass(frozen=True)
class Machine:
    """One rank, ready to step."""

    config: Config
    mesh: Mesh
    stages: list[PipelineStage]
    optimizer: Optimizer
    runner: StepRunner
    builder: InputBuilder
    encoders: Encoders


def build_machine(config: Config, mesh: Mesh) -> Machine:
    """Build everything of `train.run` that a given batch needs, with keyed initial weights."""
    megatron, kernels, attention = megatron_config(config), choose_kernels(config), choose_attention(config)
    stages = build_stages(config, mesh, megatron, kernels)
    optimizer = Optimizer(config.train, megatron, stages, mesh)
    return Machine(
        config,
        mesh,
        stages,
        optimizer,
        StepRunner(config, mesh, optimizer),
        InputBuilder(config, mesh, MegatronLayers(megatron, mesh, kernels), None, current_device(), attention),
        Encoders(mesh.pp.first, mesh.cp.rank, mesh.cp.size, mesh.tp_cp.rank, mesh.tp_cp.size),
    )


def load_weights(machine: Machine, case: Case) -> None:
    """Import the case's weights as `megabagel import-hf` does, and start from them as `run.init_from` does.

    Raises UserError on every rank when they do not fit.
    """
    if not case.weights:
        raise UserError(f"{case.path}: holds no weights; run it with --random-weights, or give the whole case")
    folders: list[str] = [tempfile.mkdtemp(prefix="megabagel-parity-")] if machine.mesh.world.first else [""]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0]) / "imported"
    wanted = set(case.weights)
    files = TensorFiles(case.path, keep=wanted.__contains__)
    try:
        once(machine.mesh, lambda: import_tensors(files, machine.config.model, folder))
        shards = optimizer_shards(machine.optimizer.distributed, {})
        tensors = sharded_tensors(machine.stages, shards, machine.mesh)
        mine = everywhere(machine.mesh, lambda: api.weights_of(folder, machine.config, tensors))
        everywhere(machine.mesh, lambda: api.load(folder, mine))
    finally:
        dist.barrier()
        if machine.mesh.world.first:
            shutil.rmtree(folders[0])
    machine.optimizer.after_load(0)
    machine.optimizer.start_averages()

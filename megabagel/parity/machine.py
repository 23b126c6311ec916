"""The weights of a case on a rank that `train.build_rank` assembled."""

import shutil
import tempfile
from pathlib import Path

import torch.distributed as dist

from megabagel.checkpoint import api
from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.checkpoint.hf.importer import import_tensors
from megabagel.checkpoint.tensors import optimizer_shards, sharded_tensors
from megabagel.errors import UserError
from megabagel.parity.case import Case
from megabagel.runtime.collective_errors import on_all_ranks, on_rank0
from megabagel.runtime.objects import broadcast
from megabagel.train.build_rank import Rank


def load_weights(machine: Rank, case: Case) -> None:
    """Import the case's weights as `megabagel import-hf` does, and start from them as `run.init_from` does.

    Raises UserError on every rank when they do not fit.
    """
    if not case.weights:
        raise UserError(f"{case.path}: holds no weights; run it with --random-weights, or give the whole case")
    first = machine.mesh.world.first
    folder = Path(broadcast(tempfile.mkdtemp(prefix="megabagel-parity-") if first else None)) / "imported"
    wanted = set(case.weights)
    files = TensorFiles(case.path, keep=wanted.__contains__)
    try:
        on_rank0(lambda: import_tensors(files, machine.config.model, folder))
        shards = optimizer_shards(machine.optimizer.distributed, {})
        tensors = sharded_tensors(machine.stages, shards, machine.mesh)
        mine = on_all_ranks(lambda: api.weights_of(folder, machine.config, tensors))
        on_all_ranks(lambda: api.load(folder, mine))
    finally:
        dist.barrier()
        if machine.mesh.world.first:
            shutil.rmtree(folder.parent)
    machine.optimizer.after_load(0)
    machine.optimizer.start_averages()

"""What a small trainer really holds, by the planner's categories: real objects on a CPU, counted in bytes.

Weights, gradients, moments and averages are counted on megatron-core's buffers and the optimizer; activations are the
storages made while one micro-batch runs forward that are alive at its end, whoever keeps them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabagel.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ResizeConfig,
    SourceConfig,
    TrainConfig,
    VitConfig,
)
from megabagel.model.inputs import Hidden
from megabagel.planner import activations
from megabagel.planner.grid import Grid
from megabagel.planner.hardware import CATALOG
from megabagel.planner.memory import state
from megabagel.planner.scenario import Case, System
from megabagel.planner.workload import typical_workload
from tests.support.grid_run import Harness, batch

HOST = System("megabagel on a CPU", engine="host")
STATE = ("weights", "gradients", "optimizer", "ema", "tables")


def config_of(grid: Grid, freeze: tuple[Any, ...] = ()) -> Config:
    """A model whose parts all have some weight, and packs of about a thousand tokens of every task."""
    tasks = ("t2i", "i2t", "edit", "text")
    config = Config(
        model=ModelConfig(
            layers=4,
            hidden=128,
            heads=8,
            kv_heads=4,
            ffn=384,
            vocab=1024,
            vit=VitConfig(layers=3, hidden=64, heads=4, ffn=160, grid=16),
            latent_grid=16,
        ),
        parallel=ParallelConfig(chunk=32),
        data=DataConfig(
            sources=tuple(SourceConfig(task, "none.tar", task) for task in tasks),
            min_tokens=900,
            max_tokens=1024,
            vae_resize=ResizeConfig(max_size=256, min_size=128),
            vit_resize=ResizeConfig(max_size=224, min_size=112),
        ),
        train=TrainConfig(packs_per_step=4, ema=0.9, freeze=freeze),
    )
    return grid.apply(config)


def predicted(grid: Grid, rank: int, freeze: tuple[Any, ...] = ()) -> dict[str, float]:
    """The planner's bytes for a pipeline rank, with one micro-batch in flight."""
    config = config_of(grid, freeze)
    workload = typical_workload(config, 1)
    case = Case(config, grid, workload.load(grid.cp, grid.tp), CATALOG["h100"], HOST)
    one = replace(case, config=replace(config, train=replace(config.train, packs_per_step=grid.dp)))
    logits = activations.logits_kept(case) if rank == grid.pp - 1 else 0.0
    return {**state(case, rank), "activations": activations.kept(one, rank) + logits}


def measured(grid: Grid, freeze: tuple[Any, ...] = ()) -> tuple[int, dict[str, float]]:
    """(pipeline rank, bytes by category) of this rank; run on every rank of the grid."""
    config = config_of(grid, freeze)
    harness = Harness(config)
    found = {**_state(harness), "activations": _activations(harness, config)}
    return harness.grid.pp.rank, found


def _state(harness: Harness) -> dict[str, float]:
    optimizer, chunks = harness.optimizer, harness.optimizer.chunks
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    frozen = [weight for chunk in chunks for weight in chunk.parameters() if not weight.requires_grad]
    weights = {_storage(buffer.param_data) for buffer in buffers} | {_storage(weight) for weight in frozen}
    shards = optimizer.shards()
    copies = [shard for shard in shards if _storage(shard) not in weights]
    moments = [optimizer.inner.state[shard][kind] for shard in shards for kind in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": _bytes([*(buffer.param_data for buffer in buffers), *frozen]),
        "gradients": _bytes([buffer.grad_data for buffer in buffers]),
        "optimizer": _bytes([*copies, *moments]),
        "ema": _bytes(list(optimizer.ema.values())),
        "tables": _bytes([table for chunk in chunks for table in torch.nn.Module.buffers(chunk.module)]),
    }


def _bytes(tensors: list[torch.Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _activations(harness: Harness, config: Config) -> float:
    """Bytes alive after forward of one micro-batch through all chunks of this rank."""
    (pack,) = typical_workload(config, 1).packs
    inputs = harness.builder.build(batch(harness.batches, pack))
    total = 0.0
    for chunk in harness.optimizer.chunks:
        stage = chunk.module
        if not stage.model.first:
            wire = _wire(harness, config, inputs)
            stage.set_input_tensor(wire)
            total += wire.untyped_storage().nbytes()
        with Alive() as alive:
            output = stage(inputs)
        leaving = output if isinstance(output, torch.Tensor) else output.ce_Q
        total += alive.bytes() - (leaving.untyped_storage().nbytes() if isinstance(output, torch.Tensor) else 0)
        del output, leaving
    return total


def _wire(harness: Harness, config: Config, inputs: Any) -> torch.Tensor:
    """A tensor such as the stage before would send."""
    from megabagel.parallel.stage_activations import to_wire

    rows = len(inputs.rope.cos_TH) // harness.optimizer.chunks[0].module.row_shards
    und = len(inputs.word_U) // harness.optimizer.chunks[0].module.row_shards
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    hidden = torch.randn(rows, config.model.hidden, dtype=dtype)
    target = torch.zeros(rows - und, config.model.latent_dim)
    return to_wire(Hidden(hidden[:und], hidden[und:], target, target[:, 0])).detach().requires_grad_()


class Alive(TorchDispatchMode):
    """Remembers every storage that operations make while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.known: dict[int, StorageWeakRef] = {}  # by address, which a later storage may take over

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and not self._is_made(tensor):
                self.known[_storage(tensor)] = StorageWeakRef(tensor.untyped_storage())  # from outside: weights, inputs
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not self._is_known(tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def _is_made(self, tensor: torch.Tensor) -> bool:
        reference, _ = self.made.get(_storage(tensor), (None, 0))
        return reference is not None and not reference.expired()

    def _is_known(self, tensor: torch.Tensor) -> bool:
        reference = self.known.get(_storage(tensor))
        return reference is not None and not reference.expired()

    def bytes(self) -> float:
        """Of the storages that are still alive."""
        return float(sum(size for reference, size in self.made.values() if not reference.expired()))


@dataclass(frozen=True)
class Row:
    """One category on one grid: the largest rank of each pipeline position, summed over positions."""

    grid: Grid
    category: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted > 0)


def rows(grid: Grid, results: list[tuple[int, dict[str, float]]], freeze: tuple[Any, ...] = ()) -> list[Row]:
    """Compare what ranks measured with the plan."""
    table = []
    for category in (*STATE, "activations"):
        found = sum(max(r[category] for p, r in results if p == rank) for rank in range(grid.pp))
        planned = sum(predicted(grid, rank, freeze)[category] for rank in range(grid.pp))
        table.append(Row(grid, category, planned, found))
    return table

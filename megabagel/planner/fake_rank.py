"""One rank of a simulated job: real process groups, stages, optimizer and shards, without storage.

torch's fake process group lets this process act as any rank of any world size; collectives return at once. Tensors are
on the meta device: they have shapes and dtypes but no values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import Range
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megabagel.checkpoint.tensors import Shard, optimizer_shards, sharded_tensors
from megabagel.config.schema import Config
from megabagel.model.sharding import Piece, named_pieces
from megabagel.parallel import mesh
from megabagel.parallel.mesh import Mesh
from megabagel.parallel.stages import PipelineStage, layer_split
from megabagel.planner.tiling import Interval
from megabagel.sequence.layout import layout_rows
from megabagel.train.build_rank import build_weights
from megabagel.train.optimizer import Optimizer


@dataclass(frozen=True)
class FakeRank:
    """Stages, shards and shapes that one rank of the job would hold."""

    mesh: Mesh
    wire_shape: tuple[int, ...]
    """Of the tensors that megatron-core's schedules exchange."""
    pieces: tuple[Piece, ...]
    """Of every learning or frozen parameter of its stages."""
    layers: tuple[range, ...]
    parameters: int
    shard_numbers: int
    """Of them, those that this rank's optimizer updates."""
    boxes: int
    """Tensors that it writes into a checkpoint."""
    flat: dict[str, tuple[int, list[Interval]]]
    """By parameter: its size, and the range that every rank with the same weights owns, by rank."""


@contextmanager
def as_rank(config: Config, world_size: int, rank: int) -> Iterator[Mesh]:
    """Initialize this process as one rank of a job, on torch's fake process group; torn down at the end."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with _gathering_alone():
            yield mesh.build(config)
    finally:
        mesh.teardown()
        dist.destroy_process_group()


def rehearse(config: Config, world_size: int, rank: int) -> FakeRank:
    """Build everything that `rank` would build before its first step."""
    with as_rank(config, world_size, rank) as grid:
        with _WithoutStorage(), torch.device("meta"):
            weights = build_weights(config, grid, initialize=False, device=torch.device("meta"))
            stages, optimizer = weights.stages, weights.optimizer
            shards = list(optimizer_shards(optimizer.distributed, optimizer.ema))
            boxes = sharded_tensors(stages, shards, grid)
        return FakeRank(
            mesh=grid,
            wire_shape=_wire_shape(config, grid, weights.megatron),
            pieces=tuple(piece for stage in stages for piece, _ in named_pieces(stage.model)),
            layers=tuple(layer_split(config)[grid.pp.rank :: grid.pp.size]),
            parameters=sum(weight.numel() for stage in stages for weight in stage.parameters()),
            shard_numbers=sum(shard.stop - shard.start for shard in shards),
            boxes=len(boxes),
            flat=_flat_ranges(optimizer, stages, shards, grid),
        )


def _wire_shape(config: Config, grid: Mesh, megatron: Any) -> tuple[int, ...]:
    """Shape of stage activations that the schedules expect to receive, from megatron-core's `get_tensor_shapes`."""
    (shape,) = get_tensor_shapes(
        seq_length=layout_rows(config.data.max_tokens, config.parallel.chunk, config.parallel.cp),
        micro_batch_size=1,
        decoder_seq_length=None,
        config=megatron,
        tp_group=grid.tp.group,
        cp_group=grid.cp.group,
    )
    return tuple(shape)


def _flat_ranges(
    optimizer: Optimizer, stages: list[PipelineStage], shards: list[Shard], grid: Mesh
) -> dict[str, tuple[int, list[Interval]]]:
    """The ranges of every parameter that each rank with the same weights owns, by megatron-core's own arithmetic."""
    names = {weight: name for stage in stages for name, weight in stage.model.named_parameters()}
    found: dict[str, tuple[int, list[Interval]]] = {
        name: (weight.numel(), []) for weight, name in names.items() if weight.requires_grad
    }
    for chunk in optimizer.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            for bucket in buffer.buckets:
                for rank in range(grid.dp_cp.size):
                    for weight, start, stop in _owned(optimizer, buffer, bucket, rank, grid.dp_cp.size):
                        found[names[weight]][1].append(Interval(rank, start, stop))
    own = {(names[shard.parameter], Interval(grid.dp_cp.rank, shard.start, shard.stop)) for shard in shards}
    told = {(name, i) for name, (_, intervals) in found.items() for i in intervals if i.rank == grid.dp_cp.rank}
    assert own == told, "the optimizer's shards differ from the ranges of its buffers"
    return found


def _owned(optimizer: Optimizer, buffer: Any, bucket: Any, rank: int, size: int) -> Iterator[tuple[Any, int, int]]:
    """(parameter, start, stop) of the elements in a bucket that one of `size` ranks owns."""
    # Calls a private method of DistributedOptimizer rather than repeat its arithmetic, so that the dry run checks the
    # ranges that training would use.
    share = bucket.grad_data.numel() // size
    world = Range(bucket.offset + rank * share, bucket.offset + (rank + 1) * share)
    ranges = optimizer.distributed._build_model_gbuf_param_range_map(buffer.param_index_map, world, bucket.offset)
    for weight, by_view in ranges.items():
        yield weight, by_view["param"].start, by_view["param"].end


@contextmanager
def _gathering_alone() -> Iterator[None]:
    """Replace `all_gather_object` by one that returns this rank's object for every rank.

    megatron-core's optimizer compares parameter groups with it. torch pickles objects into tensors, and tensors of this
    process have no values.
    """

    def gather(out: list[Any], mine: Any, group: Any = None) -> None:
        out[:] = [mine] * len(out)

    real, dist.all_gather_object = dist.all_gather_object, gather  # type: ignore[assignment] # torch's has no types
    try:
        yield
    finally:
        dist.all_gather_object = real


class _WithoutStorage(TorchFunctionMode):
    """Creates all tensors on the meta device, whichever device was requested."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        if func is torch.Tensor.type and len(args) == 1:
            # DistributedOptimizer recognises parameters by this string.
            return {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float32: "torch.cuda.FloatTensor"}[args[0].dtype]
        return func(*args, **kwargs)

"""Sharded tensors of a run: fp32 weights, moments and averaged weights, as slices of the whole model's tensors.

Keys are `<kind>/<name>` with the kinds `weight`, `exp_avg`, `exp_avg_sq` and `ema`; names do not depend on the grid.
Frozen weights have neither moments nor averages. The tensors are views of the optimizer's shards: saving copies
nothing, and loading fills them in place.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megabagel.checkpoint.slices import boxes
from megabagel.model.sharding import Piece, pieces
from megabagel.parallel.mesh import Mesh
from megabagel.parallel.stages import PipelineStage

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """A rank's flat share of one parameter: elements [start, stop) of the local parameter, and their states."""

    parameter: torch.nn.Parameter
    start: int
    stop: int
    states: dict[str, torch.Tensor]
    """Flat fp32 tensors of stop - start elements, by kind."""


def optimizer_shards(distributed: Any, ema: dict[torch.Tensor, torch.Tensor]) -> Iterator[Shard]:
    """Yield the shards that megatron-core's distributed optimizer keeps on this rank."""
    # Internals of megatron-core's DistributedOptimizer: buffer ranges by type, bucket and parameter.
    for by_type in distributed.gbuf_ranges:
        for by_bucket in by_type.values():
            for bucket in by_bucket:
                for parameter, ranges in bucket["param_map"].items():
                    group, order = distributed.model_param_group_index_map[parameter]
                    weight = distributed.optimizer.param_groups[group]["params"][order]
                    moments = distributed.optimizer.state[weight]
                    states = {"weight": weight, **{kind: moments[kind] for kind in MOMENTS}}
                    if weight in ema:
                        states["ema"] = ema[weight]
                    yield Shard(parameter, ranges["param"].start, ranges["param"].end, states)


def frozen_tensors(stages: list[PipelineStage], mesh: Mesh) -> dict[str, ShardedTensor]:
    """Return this rank's pieces of frozen weights, in the model's type: the optimizer does not hold them."""
    found = {}
    for name, parameter in (named for stage in stages for named in stage.model.named_parameters()):
        for piece in pieces(name, parameter) if not parameter.requires_grad else ():
            data = piece.view(parameter.detach())
            found[f"frozen/{piece.name}"] = ShardedTensor(
                key=f"weight/{piece.name}",
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_shape=piece.shape,
                global_offset=piece.offset,
                axis_fragmentations=None,
                replica_id=(mesh.dp_cp.rank, mesh.tp.rank if piece.replicated else 0),
            )
    return found


def sharded_tensors(stages: list[PipelineStage], shards: Iterable[Shard], mesh: Mesh) -> dict[str, ShardedTensor]:
    """Return every slice of every shard of this rank under unique labels, and the frozen weights."""
    names = {parameter: name for stage in stages for name, parameter in stage.model.named_parameters()}
    found = {}
    for shard in shards:
        for piece in pieces(names[shard.parameter], shard.parameter):
            for kind, flat in shard.states.items():
                for number, tensor in enumerate(boxes_of(shard, piece, kind, flat.detach(), mesh.tp.rank)):
                    found[f"{kind}/{piece.name}/{number}"] = tensor
    return found | frozen_tensors(stages, mesh)


def boxes_of(shard: Shard, piece: Piece, kind: str, flat: torch.Tensor, tp_rank: int) -> Iterator[ShardedTensor]:
    """Yield the slices of a piece that a shard covers.

    Args:
        shard: flat range of the local parameter.
        piece: part of the parameter that is one tensor of the whole model (or this rank's part of it).
        kind: `weight`, `exp_avg`, `exp_avg_sq` or `ema`.
        flat: values of the shard, [stop - start].
        tp_rank: replicated pieces are written by tensor-parallel rank 0 alone.
    """
    shape = list(shard.parameter.shape)
    row = 1
    # Pieces along dimension 0 lie one after the other in memory; along another dimension there is only one.
    if piece.dim == 0:
        row = shard.parameter[0].numel()
        shape[0] = piece.length
    first, last = piece.start * row, piece.start * row + torch.Size(shape).numel()
    start, stop = max(shard.start, first), min(shard.stop, last)
    if start >= stop:
        return
    for box in boxes(start - first, stop - first, tuple(shape)):
        at = start - shard.start + box.at
        yield ShardedTensor(
            key=f"{kind}/{piece.name}",
            data=flat[at : at + box.size].view(box.shape),
            dtype=flat.dtype,
            local_shape=box.shape,
            global_shape=piece.shape,
            global_offset=tuple(mine + whole for mine, whole in zip(box.offset, piece.offset, strict=True)),
            axis_fragmentations=None,  # boxes form no regular grid
            replica_id=(0, tp_rank if piece.replicated else 0),
        )

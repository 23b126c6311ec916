"""Whole tensors from the boxes that ranks hold: gradients, weights and averages, on rank 0, by published name."""

from collections.abc import Iterable, Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from megabagel.checkpoint.hf.names import official_name
from megabagel.checkpoint.tensors import Shard, optimizer_shards, sharded_tensors
from megabagel.runtime.objects import gathered, gathered_bytes
from megabagel.train.build_rank import Rank


def gather_gradients(machine: Rank) -> dict[str, Tensor]:
    """Gradients of the step just run, summed over ranks; nothing for weights that do not learn. {} but on rank 0."""
    tensors = sharded_tensors(machine.stages, _gradients(machine), machine.mesh).values()
    return _whole(tensor for tensor in tensors if tensor.key.startswith("grad/"))


def gather_weights(machine: Rank, kind: str) -> dict[str, Tensor]:
    """Weights of one kind, `weight` or `ema`. {} but on rank 0."""
    shards = optimizer_shards(machine.optimizer.distributed, machine.optimizer.ema)
    tensors = sharded_tensors(machine.stages, shards, machine.mesh).values()
    return _whole(tensor for tensor in tensors if tensor.key.startswith(f"{kind}/"))


def _gradients(machine: Rank) -> Iterator[Shard]:
    """The part of each gradient that is reduced on this rank."""
    for shard in optimizer_shards(machine.optimizer.distributed, {}):
        gradient = shard.parameter.main_grad.flatten()[shard.start : shard.stop]  # type: ignore[attr-defined]
        yield Shard(shard.parameter, shard.start, shard.stop, {"grad": gradient})


def _whole(tensors: Iterable[ShardedTensor]) -> dict[str, Tensor]:
    mine: dict[str, Tensor] = {}
    places: dict[str, list[object]] = {}
    for tensor in tensors:
        if is_main_replica(tensor.replica_id):
            number = str(len(mine))
            mine[number] = tensor.data.detach().float().cpu().clone(memory_format=torch.contiguous_format)
            places[number] = [tensor.key.partition("/")[2], tensor.global_shape, tensor.global_offset]
    found: dict[str, Tensor] = {}
    for theirs, data in zip(gathered(places), gathered_bytes(to_bytes(mine)), strict=True):
        for number, box in from_bytes(data).items():
            name, shape, offset = theirs[number]
            whole = found.setdefault(official_name(name), torch.full(shape, torch.nan))
            whole[tuple(slice(at, at + size) for at, size in zip(offset, box.shape, strict=True))] = box
    return found

"""Comparison of the copies of weights and optimizer states that several ranks hold: silent corruption made visible.

Ranks of one data- and context-parallel group hold the same model weights; tensor-parallel ranks hold the same
replicated weights (norms, biases after a row-parallel linear, timestep embedder, a ViT tower that is not split) with
the same moments and averages. All are computed by the same arithmetic on the same numbers, so they are equal bit for
bit. A copy that is not was changed by a fault of memory, device or software, and training on it spoils the run without
any error. docs/faults.md#copies-that-differ.
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from megabagel.checkpoint.tensors import Shard
from megabagel.parallel.mesh import Axis, Mesh
from megabagel.parallel.stages import PipelineStage
from megabagel.runtime.collective_errors import all_max
from megabagel.runtime.objects import all_gathered

logger = logging.getLogger(__name__)

NAMED = 3
"""Most tensors that a message names."""

Named = tuple[str, torch.Tensor]
"""(name, values)."""

Difference = tuple[str, list[int]]
"""(description that names tensor and ranks, these ranks)."""

_CHUNK = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Integer type by bytes of an element. 8 bytes are taken as two words: the product of a highest bit with any odd number
is the same, so two changed signs would cancel."""
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 / golden ratio, an odd number, as a signed integer: multiples of it are spread over all 64 bits."""


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit hash of the bits of a tensor: an int64 scalar on its device.

    The sum of the elements' bits times odd multipliers that depend on the place, modulo 2^64. Integer sums do not
    depend on their order, so the hash is the same on every device. A change of one element always changes it: the
    difference is a number of at most 33 bits, not 0, times an odd one.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    multipliers = _multipliers(min(len(bits), _CHUNK), bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    # In chunks, because bits become int64: 8 bytes beside the 2 of a bf16 weight.
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        total = total * _GOLDEN + (part * multipliers[: len(part)]).sum()
    return total


def _multipliers(count: int, device: torch.device) -> torch.Tensor:
    """Return `count` odd int64 multipliers, the same on every device."""
    spread = torch.arange(1, count + 1, device=device) * _GOLDEN
    return (spread ^ (spread >> 29)) * _GOLDEN | 1


def model_copies(stages: Iterable[PipelineStage]) -> Iterator[Named]:
    """Yield the weights and buffers that all ranks of a data- and context-parallel group hold."""
    for stage in stages:
        yield from stage.model.named_parameters()
        yield from stage.model.named_buffers()


def tensor_parallel_copies(stages: Iterable[PipelineStage], shards: Iterable[Shard]) -> Iterator[Named]:
    """Yield what all ranks of a tensor-parallel group hold: replicated weights, their moments and their averages.

    Moments and averages are cut over data-parallel ranks at the same places on every tensor-parallel rank.
    """
    names = {}
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            if (sharded := getattr(parameter, "sharded", None)) is None or sharded.size == 1:
                names[parameter] = name
                yield name, parameter
        yield from stage.model.named_buffers()
    for shard in shards:
        if shard.parameter in names:
            for kind, flat in shard.states.items():
                yield f"{kind} of {names[shard.parameter]}", flat


def replica_differences(stages: list[PipelineStage], shards: Iterable[Shard], mesh: Mesh) -> str | None:
    """Compare every copy over its ranks; return a description of those that differ, the same on every rank, or None.

    Collective. Without a difference it costs one all-reduce of 16 bytes per tensor and axis.
    """
    started = time.perf_counter()
    over = [(mesh.dp_cp, list(model_copies(stages))), (mesh.tp, list(tensor_parallel_copies(stages, shards)))]
    over = [(axis, copies) for axis, copies in over if axis.size > 1]
    found = [line for axis, copies in over for line in _differences(copies, axis)]
    if over:
        counts = ", ".join(f"{len(copies)} tensors over {axis.size} ranks" for axis, copies in over)
        logger.info("copies compared: %s (%.2f s)", counts, time.perf_counter() - started)
    return described(found)


def described(mine: list[Difference]) -> str | None:
    """Return the differences that any rank found as one text, or None. Collective, the same on every rank."""
    (most,) = all_max(len(mine))
    if not most:
        return None
    told = all_gathered([socket.gethostname(), mine])
    hosts = [host for host, _ in told]
    found = {text: ranks for _, differences in told for text, ranks in differences}
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    shown = list(found)[:NAMED]
    places = (f"rank {rank} is on {hosts[rank]}" for rank in sorted({rank for text in shown for rank in found[text]}))
    return f"{'; '.join(shown)}{more} ({', '.join(places)})"


def _differences(copies: list[Named], axis: Axis) -> list[Difference]:
    """Return the tensors whose copies differ over the ranks of an axis; the same on all of them."""
    if not copies:
        return []
    mine = torch.stack([fingerprint(tensor) for _, tensor in copies])
    # ~ reverses the order, so one maximum gives both ends.
    ends = torch.cat([mine, ~mine])
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=axis.group)
    most, least = ends[: len(mine)], ~ends[len(mine) :]
    odd = (most != least).nonzero().flatten()
    if not len(odd):
        return []
    held = [torch.empty_like(mine[odd]) for _ in range(axis.size)]
    dist.all_gather(held, mine[odd], group=axis.group)
    by_tensor = torch.stack(held, 1).tolist()
    ranks = dist.get_process_group_ranks(axis.group)
    return [
        _judged(copies[number][0], dict(zip(ranks, hashes, strict=True)))
        for number, hashes in zip(odd.tolist(), by_tensor, strict=True)
    ]


def _judged(name: str, hashes: dict[int, int]) -> Difference:
    """Return the difference of one tensor: the ranks of the minority, or all where there is no majority."""
    (usual, count), *_ = Counter(hashes.values()).most_common()
    others = [rank for rank, value in hashes.items() if value != usual]
    if 2 * count > len(hashes):
        return f"{name} on {ranks_text(others)} differs from the {count} other copies", others
    return f"{name} differs between {ranks_text(list(hashes))}", list(hashes)


def ranks_text(ranks: list[int]) -> str:
    """Return "rank 3" or "ranks 3, 5"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"

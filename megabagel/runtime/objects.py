"""Collectives for small Python values, encoded as JSON.

torch's `..._object` collectives unpickle what other ranks send, and a pickle can run code; JSON cannot. Tuples come
back as lists.
"""

import json
from typing import Any

import torch
import torch.distributed as dist

from megabagel.runtime.device import current_device


def all_gathered(mine: Any) -> list[Any]:
    """Return the values of all ranks, by rank, on every rank; without a process group, this process's alone."""
    if not dist.is_initialized():
        return [json.loads(json.dumps(mine))]
    counts, padded = _padded(json.dumps(mine).encode())
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [json.loads(_bytes(part, count)) for part, count in zip(parts, counts, strict=True)]


def gathered(mine: Any) -> list[Any]:
    """Return the values of all ranks, by rank, on rank 0; an empty list elsewhere."""
    return [json.loads(data) for data in gathered_bytes(json.dumps(mine).encode())]


def gathered_bytes(mine: bytes) -> list[bytes]:
    """Return the bytes of all ranks, by rank, on rank 0; an empty list elsewhere."""
    counts, padded = _padded(mine)
    parts = [torch.empty_like(padded) for _ in counts] if dist.get_rank() == 0 else None
    dist.gather(padded, parts)
    return [_bytes(part, count) for part, count in zip(parts or (), counts, strict=parts is not None)]


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank; the argument of other ranks is ignored."""
    # Through all_gathered, which handles unknown sizes: values are small and this is rare.
    return all_gathered(value if dist.get_rank() == 0 else None)[0]


def _padded(mine: bytes) -> tuple[list[int], torch.Tensor]:
    """Return (bytes of each rank; this rank's, padded to the longest, on the device that collectives use)."""
    size = torch.tensor([len(mine)], device=current_device())
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(count) for count in sizes]
    padded = torch.zeros(max(1, *counts), dtype=torch.uint8)
    if mine:
        padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    return counts, padded.to(current_device())


def _bytes(part: torch.Tensor, count: int) -> bytes:
    """Return the first `count` bytes of a tensor."""
    return part[:count].cpu().numpy().tobytes()

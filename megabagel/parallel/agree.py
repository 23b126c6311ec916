"""One error on every rank: what fails for one rank is told to all, so that none waits in a collective for ever."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megabagel.errors import UserError
from megabagel.parallel import host
from megabagel.parallel.progress import all_reduced
from megabagel.parallel.topology import Topology

T = TypeVar("T")


def everywhere(topology: Topology, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it raises UserError on any, raise the lowest rank's message on all.

    The message names the rank where no other one says the same.
    """
    result, mistakes = _attempt(topology, action)
    for rank, text in mistakes.items():
        alone = topology.world.size > 1 and list(mistakes.values()).count(text) == 1
        raise UserError(f"rank {rank}: {text}" if alone else text)
    return result  # type: ignore[return-value]


def once(topology: Topology, action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait for its outcome."""
    _, mistakes = _attempt(topology, action if topology.world.first else lambda: None)
    if mistakes:
        raise UserError(mistakes[0])


def largest(*mine: int) -> list[int]:
    """The largest of each number over all ranks, on every rank: one small all-reduce."""
    found = torch.tensor(mine, device=host.device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return all_reduced(found).tolist()


def union(topology: Topology, mine: frozenset[T]) -> frozenset[T]:
    """What any rank holds, on every rank."""
    parts: list[frozenset[T]] = [frozenset()] * topology.world.size
    dist.all_gather_object(parts, mine)
    return frozenset().union(*parts)


def _attempt(topology: Topology, action: Callable[[], T]) -> tuple[T | None, dict[int, str]]:
    """(result here, messages of UserErrors by rank). Costs one small all-reduce while nothing goes wrong."""
    message, result = None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    failed = torch.tensor(int(message is not None), device=host.device())
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if not all_reduced(failed):
        return result, {}
    messages: list[str | None] = [None] * topology.world.size
    dist.all_gather_object(messages, message)
    return result, {rank: text for rank, text in enumerate(messages) if text is not None}

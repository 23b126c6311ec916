"""One error on every rank: what fails for one rank is told to all, so that none waits in a collective for ever."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megabagel.errors import UserError
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.device import current_device
from megabagel.runtime.phase import all_reduced

T = TypeVar("T")


def everywhere(mesh: Mesh, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it raises UserError on any, raise the lowest rank's message on all.

    The message names the rank where no other one says the same.
    """
    result, mistakes = _attempt(mesh, action)
    for rank, text in mistakes.items():
        alone = mesh.world.size > 1 and list(mistakes.values()).count(text) == 1
        raise UserError(f"rank {rank}: {text}" if alone else text)
    return result  # type: ignore[return-value]


def once(mesh: Mesh, action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait for its outcome."""
    _, mistakes = _attempt(mesh, action if mesh.world.first else lambda: None)
    if mistakes:
        raise UserError(mistakes[0])


def largest(*mine: int) -> list[int]:
    """The largest of each number over all ranks, on every rank: one small all-reduce."""
    found = torch.tensor(mine, device=current_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return all_reduced(found).tolist()


def union(mesh: Mesh, mine: frozenset[T]) -> frozenset[T]:
    """What any rank holds, on every rank."""
    parts: list[frozenset[T]] = [frozenset()] * mesh.world.size
    dist.all_gather_object(parts, mine)
    return frozenset().union(*parts)


def _attempt(mesh: Mesh, action: Callable[[], T]) -> tuple[T | None, dict[int, str]]:
    """(result here, messages of UserErrors by rank). Costs one small all-reduce while nothing goes wrong."""
    message, result = None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    failed = torch.tensor(int(message is not None), device=current_device())
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if not all_reduced(failed):
        return result, {}
    messages: list[str | None] = [None] * mesh.world.size
    dist.all_gather_object(messages, message)
    return result, {rank: text for rank, text in enumerate(messages) if text is not None}

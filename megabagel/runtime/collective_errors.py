"""Error propagation across ranks.

A UserError on one rank would leave the others blocked in the next collective until its time limit. These helpers
exchange a failure flag first, so that every rank raises the same error. Cost: one all-reduce of one integer per call,
and an all-gather of the messages once a rank has failed.

All of them span torch.distributed's default group and have to be called on every rank of it. Without a group (a
notebook, a test of one device) this process is the only rank, and nothing is exchanged.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megabagel.errors import UserError
from megabagel.runtime.device import current_device
from megabagel.runtime.phase import all_reduced

T = TypeVar("T")


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; if any rank fails, raise its error on all ranks.

    Raises:
        UserError: the message of the lowest failing rank, with the rank in front unless another rank failed alike.
    """
    result, errors = _attempt(action)
    for rank, text in errors.items():
        alone = _world_size() > 1 and list(errors.values()).count(text) == 1
        raise UserError(f"rank {rank}: {text}" if alone else text)
    return result  # type: ignore[return-value]


def on_rank0(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait for it; if it fails, raise its error on all ranks.

    Raises:
        UserError: the message of rank 0.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    _, errors = _attempt(action if first else lambda: None)
    if errors:
        raise UserError(errors[0])


def all_max(*values: int) -> list[int]:
    """Element-wise maximum over all ranks (one all-reduce)."""
    found = torch.tensor(values, device=current_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return all_reduced(found).tolist()


def all_union(values: frozenset[T]) -> frozenset[T]:
    """Union of the sets of all ranks (one all-gather of pickled objects, so for rare use)."""
    parts: list[frozenset[T]] = [frozenset()] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return frozenset().union(*parts)


def _attempt(action: Callable[[], T]) -> tuple[T | None, dict[int, str]]:
    """Result on this rank, and the messages of UserErrors by rank."""
    message, result = None, None
    try:
        result = action()
    except UserError as error:
        if not dist.is_initialized():
            raise
        message = str(error)
    if not dist.is_initialized():
        return result, {}
    failed = torch.tensor(int(message is not None), device=current_device())
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if not all_reduced(failed):
        return result, {}
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return result, {rank: text for rank, text in enumerate(messages) if text is not None}


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

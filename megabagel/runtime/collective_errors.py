"""Error propagation across ranks.

A UserError on one rank would leave the others blocked in the next collective until its time limit. These helpers
exchange a failure flag first, so that every rank raises the same error. Cost: one all-reduce of one integer per call,
and an all-gather of the messages once a rank has failed.

All of them span torch.distributed's default group and have to be called on every rank of it. Without a group (a
notebook, a test of one device) this process is the only rank, and nothing is exchanged.
"""

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megabagel.errors import TransientFailure, UserError, named
from megabagel.runtime.device import current_device
from megabagel.runtime.identity import first_difference
from megabagel.runtime.objects import all_gathered, broadcast
from megabagel.runtime.phase import all_reduced

T = TypeVar("T")


Failure = tuple[bool, str]
"""(whether another start may not meet it, message)."""


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; if any rank fails, raise its error on all ranks.

    Raises:
        UserError: the message of the lowest failing rank, prefixed with the rank unless several failed alike; a
            TransientFailure where `errors.named` makes it one. Other exceptions (bugs) pass through on the rank that
            raised them.
    """
    result, failures = _attempt(action)
    for rank, failure in failures.items():
        alone = _world_size() > 1 and list(failures.values()).count(failure) == 1
        raise _raised(failure, f"rank {rank}: " if alone else "")
    return result  # type: ignore[return-value]


def on_rank0(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait; errors are raised on all ranks as by `on_all_ranks`."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    _, failures = _attempt(action if first else lambda: None)
    if failures:
        raise _raised(failures[0])


def from_rank0(make: Callable[[], Any]) -> Any:
    """Return on every rank the JSON value that rank 0 makes; errors are raised on all ranks as by `on_all_ranks`."""
    made: list[Any] = []
    on_rank0(lambda: made.append(make()))
    return broadcast(made[0] if made else None) if dist.is_initialized() else made[0]


def _raised(failure: Failure, where: str = "") -> UserError:
    """Return the exception of a failure."""
    transient, text = failure
    return (TransientFailure if transient else UserError)(f"{where}{text}")


def all_max(*values: int) -> list[int]:
    """Element-wise maximum over all ranks (one all-reduce)."""
    found = torch.tensor(values, device=current_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return all_reduced(found).tolist()


def all_union(values: frozenset[str]) -> frozenset[str]:
    """Union of the sets of all ranks (one all-gather of JSON: not for every step)."""
    return frozenset().union(*all_gathered(sorted(values)))


def require_equal(facts: Mapping[str, str]) -> None:
    """Compare facts (name -> value) of all ranks with those of rank 0.

    Raises:
        UserError: on every rank if one differs; names the first differing fact and the lowest rank.
    """
    place = f"{socket.gethostname()}, process {os.getpid()}"
    told = dict(enumerate(all_gathered([dict(facts), place])))
    found = first_difference({rank: of for rank, (of, _) in told.items()}, {rank: at for rank, (_, at) in told.items()})
    if found:
        raise UserError(found)


def _attempt(action: Callable[[], T]) -> tuple[T | None, dict[int, Failure]]:
    """Run `action`; returns its result on this rank, and the failures of all ranks by rank."""
    failure: Failure | None = None
    result = None
    try:
        result = action()
    except Exception as error:
        end = named(error)
        if not isinstance(end, UserError):
            raise
        failure = isinstance(end, TransientFailure), str(end)
    if not dist.is_initialized():
        return result, {} if failure is None else {0: failure}
    # Two stages: the usual case costs an all-reduce of one integer, messages are gathered only after a failure.
    failed = torch.tensor(int(failure is not None), device=current_device())
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if not all_reduced(failed):
        return result, {}
    return result, {rank: tuple(told) for rank, told in enumerate(all_gathered(failure)) if told is not None}


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

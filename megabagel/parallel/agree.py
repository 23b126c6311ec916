"""One error on every rank: what fails for one rank is told to all, so that none waits in a collective for ever."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megabagel.errors import UserError
from megabagel.parallel.topology import Topology

T = TypeVar("T")


def everywhere(topology: Topology, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it raises UserError on any, raise the lowest rank's message on all."""
    message, result = None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [None] * topology.world.size
    dist.all_gather_object(messages, message)
    for rank, text in enumerate(messages):
        if text is not None:
            raise UserError(text if topology.world.size == 1 or messages.count(text) > 1 else f"rank {rank}: {text}")
    return result  # type: ignore[return-value]


def once(topology: Topology, action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait for its outcome."""
    everywhere(topology, action if topology.world.first else lambda: None)

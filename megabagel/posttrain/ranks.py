"""Stages on a grid: every rank makes the same calls of the model, rank 0 alone reads and writes files."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megabagel.errors import UserError
from megabagel.runtime import objects


def first_rank() -> bool:
    """Whether this process writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """The JSON value that rank 0 makes, on every rank; its UserError too."""
    if not dist.is_initialized():
        return make()
    value, message = None, None
    if first_rank():
        try:
            value = make()
        except UserError as error:
            message = str(error)
    value, message = objects.broadcast([value, message])
    if message is not None:
        raise UserError(message)
    return value

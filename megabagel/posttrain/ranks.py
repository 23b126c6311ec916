"""Stages on a grid: every rank makes the same calls of the model, rank 0 alone reads and writes files."""

import torch.distributed as dist


def first_rank() -> bool:
    """Whether this process writes."""
    return not dist.is_initialized() or dist.get_rank() == 0

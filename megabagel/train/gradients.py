"""Norm and clipping of a step's gradients with one host synchronization, whatever packages are installed.

Without Transformer Engine and Apex megatron-core reads the norm of every gradient shard on the host, up to 836
synchronizations per step for the 7B model, and clips through temporaries of the gradients' size.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gradient_norm(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup, device: torch.device) -> float:
    """Return the L2 norm over the gradients of all ranks; on a CPU the same bits as megatron-core's.

    Args:
        gradients: fp32 shards of this rank, each part of the model on one rank only.
        group: ranks whose gradients belong to the norm.
        device: of the gradients, for ranks without any.
    """
    total = torch.zeros(1, device=device)
    if gradients:
        norms = torch._foreach_norm(list(gradients))
        total = torch.linalg.vector_norm(torch.stack(norms)).reshape(1) ** 2.0
    dist.all_reduce(total, group=group)
    return float(total.item() ** 0.5)


def clip_gradients(gradients: Sequence[torch.Tensor], most: float, norm: float) -> None:
    """Scale gradients in place such that their global norm is at most `most`.

    Args:
        gradients: shards of this rank.
        most: largest norm.
        norm: global norm, from `gradient_norm`.
    """
    scale = most / (norm + 1.0e-6)
    if scale < 1.0 and gradients:
        torch._foreach_mul_(list(gradients), scale)

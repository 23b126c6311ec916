"""Attention under the mask of a batch: engine choice, and context parallelism by gathering keys and values.

Legend: C rows of this context-parallel rank, R rows of all of them; N query heads, M key/value heads of this
tensor-parallel rank, H head dimension.

Queries stay where they are. With grouped queries K and V are small beside the hidden state, so all ranks' K and V are
gathered in one collective and the mask's integers, which carry the sequence order, do the rest (kernels-design 3).
"""

import logging

import torch
from megabagel_kernels.attention.host import host_attention, plan_host
from megabagel_kernels.attention.mask import AttentionCodes
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megabagel.config.schema import ParallelConfig
from megabagel.model.inputs import Attend
from megabagel.parallel import host
from megabagel.parallel.topology import Axis

logger = logging.getLogger(__name__)


def choose_attention(config: ParallelConfig) -> None:
    """Say in the log which engine attention runs on, and why."""
    why = "asked for" if config.attention != "auto" else "the only engine of this version"
    logger.info("attention engine: host (%s)", why)
    if host.device().type != "cpu":
        logger.warning("attention engine host computes on the CPU: every layer copies there and back, for checks only")


def attend_across(codes: AttentionCodes, cp: Axis | None = None) -> Attend:
    """Attention of this rank's queries to the keys of every context-parallel rank; without `cp`, of this rank alone."""
    plan = plan_host(codes)

    def attend(q_CNH: torch.Tensor, k_CMH: torch.Tensor, v_CMH: torch.Tensor) -> torch.Tensor:
        if cp is not None and cp.size > 1:
            k_CMH, v_CMH = join_over_cp(torch.cat([k_CMH, v_CMH], 1), cp).chunk(2, 1)
        return host_attention(q_CNH.cpu(), k_CMH.cpu(), v_CMH.cpu(), plan).to(q_CNH.device)

    return attend


def join_over_cp(x: torch.Tensor, cp: Axis) -> torch.Tensor:
    """Rows of every rank, one after the other; backward sums gradients over ranks and hands each its rows."""
    if cp.size == 1:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=cp.group)

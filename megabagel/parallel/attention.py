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
from megabagel.parallel.topology import Axis

logger = logging.getLogger(__name__)


def choose_attention(config: ParallelConfig) -> str:
    """Name of the attention engine for this run, logged."""
    why = "asked for" if config.attention != "auto" else "the only engine of this version"
    logger.info("attention engine: host (%s)", why)
    return "host"


def attend_within(codes: AttentionCodes) -> Attend:
    """Attention among the rows of this rank alone (ViT images, a pack without context parallelism)."""
    plan = plan_host(codes)

    def attend(q_CNH: torch.Tensor, k_CMH: torch.Tensor, v_CMH: torch.Tensor) -> torch.Tensor:
        return host_attention(q_CNH, k_CMH, v_CMH, plan)

    return attend


def attend_across(codes: AttentionCodes, cp: Axis) -> Attend:
    """Attention of this rank's queries to the keys of every context-parallel rank."""
    if cp.size == 1:
        return attend_within(codes)
    plan = plan_host(codes)

    def attend(q_CNH: torch.Tensor, k_CMH: torch.Tensor, v_CMH: torch.Tensor) -> torch.Tensor:
        kv_CMH = torch.cat([k_CMH, v_CMH], 1)
        k_RMH, v_RMH = join_over_cp(kv_CMH, cp).chunk(2, 1)
        return host_attention(q_CNH, k_RMH, v_RMH, plan)

    return attend


def join_over_cp(x: torch.Tensor, cp: Axis) -> torch.Tensor:
    """Rows of every rank, one after the other; backward sums gradients over ranks and hands each its rows."""
    if cp.size == 1:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=cp.group)

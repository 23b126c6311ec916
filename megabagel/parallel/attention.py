"""Attention under the mask of a batch: the engines, and context parallelism by gathering keys and values.

Legend: C rows of this context-parallel rank, R rows of all of them; N query heads, M key/value heads of this
tensor-parallel rank, H head dimension.

Queries stay where they are. With grouped queries K and V are small beside the hidden state, so all ranks' K and V are
gathered in one collective and the mask's integers, which carry the sequence order, do the rest (kernels-design 3).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megabagel_kernels.attention.configs import configs_here, lacking_here
from megabagel_kernels.attention.flex_engine import flex_attention_packed, plan_flex
from megabagel_kernels.attention.host import host_attention, plan_host
from megabagel_kernels.attention.mask import AttentionCodes
from megabagel_kernels.attention.triton_engine import plan_triton, triton_attention
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.model.inputs import Attend
from megabagel.parallel import host
from megabagel.parallel.megatron import parameter_dtype
from megabagel.parallel.topology import Axis

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionEngine:
    """One way to compute attention under mask integers; all give the same up to rounding."""

    name: str
    plan: Callable[[AttentionCodes, int], Any]
    """(mask, head dimension) -> plan, once per batch."""
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]
    """(q [C, N, H], k [R, M, H], v [R, M, H], plan) -> [C, N, H]."""
    has_backward: bool = True


def _host(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> torch.Tensor:
    return host_attention(q.cpu(), k.cpu(), v.cpu(), plan).to(q.device)


HOST = AttentionEngine("host", lambda codes, head: plan_host(codes), _host)


def choose_attention(config: Config) -> AttentionEngine:
    """The engine that `parallel.attention` names, or the best for this device. Says in the log which one, and why.

    Raises UserError when the one that was asked for cannot run here.
    """
    cuda = host.device().type == "cuda"
    name, why = config.parallel.attention, "asked for"
    if name == "auto" and not cuda:
        name, why = "host", "this is a CPU"
    elif name == "auto":
        lacking = lacking_here(parameter_dtype(config), config.model.kv_channels)
        name, why = ("flex", lacking) if lacking else ("triton", "kernels for this GPU")
    elif name == "triton" and (lacking := lacking_here(parameter_dtype(config), config.model.kv_channels)):
        raise UserError(f"parallel.attention=triton: {lacking}. Use auto, which takes the best engine of this machine.")
    logger.info("attention engine: %s (%s)", name, why)
    if name == "host" and cuda:
        logger.warning("attention engine host computes on the CPU: every layer copies there and back, for checks only")
    return {"host": HOST, "flex": _flex(cuda), "triton": _triton(config)}[name]


def _flex(cuda: bool) -> AttentionEngine:
    return AttentionEngine("flex", lambda codes, head: plan_flex(codes, host.device()), flex_attention_packed, cuda)


def _triton(config: Config) -> AttentionEngine:
    def plan(codes: AttentionCodes, head: int) -> Any:
        return plan_triton(codes, configs_here(parameter_dtype(config), head)).to(host.device())

    return AttentionEngine("triton", plan, triton_attention)


def attend_across(codes: AttentionCodes, engine: AttentionEngine, head: int, cp: Axis | None = None) -> Attend:
    """Attention of this rank's queries to the keys of every context-parallel rank; without `cp`, of this rank alone.

    head: head dimension.
    """
    plan = engine.plan(codes, head)

    def attend(q_CNH: torch.Tensor, k_CMH: torch.Tensor, v_CMH: torch.Tensor) -> torch.Tensor:
        if cp is not None and cp.size > 1:
            k_CMH, v_CMH = join_over_cp(torch.cat([k_CMH, v_CMH], 1), cp).chunk(2, 1)
        return engine.run(q_CNH, k_CMH, v_CMH, plan)

    return attend


def join_over_cp(x: torch.Tensor, cp: Axis) -> torch.Tensor:
    """Rows of every rank, one after the other; backward sums gradients over ranks and hands each its rows."""
    if cp.size == 1:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=cp.group)

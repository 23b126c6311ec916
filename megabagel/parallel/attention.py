"""Attention under the mask of a batch: the engines, and context parallelism by gathering keys and values.

Shape letters: docs/notation.md.

Queries stay where they are. With grouped queries K and V are small beside the hidden state, so all ranks' K and V are
gathered in one collective and the mask's integers, which carry the sequence order, do the rest.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megabagel_kernels.attention.configs import Configs, configs_here, lacking_head, lacking_here
from megabagel_kernels.attention.flex_engine import (
    BLOCK,
    FA4_BLOCK_ROWS,
    FlexPlan,
    flex_attention_packed,
    lacking_fa4,
    plan_flex,
)
from megabagel_kernels.attention.host import HostPlan, host_attention, plan_host
from megabagel_kernels.attention.mask import AttentionCodes
from megabagel_kernels.attention.triton_engine import TritonPlan, plan_triton, triton_attention
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.model.inputs import Attend, LayerAttend
from megabagel.parallel.megatron import parameter_dtype
from megabagel.parallel.mesh import Axis
from megabagel.runtime.device import current_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionEngine:
    """One way to compute attention under mask integers; all give the same up to rounding."""

    name: str
    plan: Callable[[AttentionCodes, int], Any]
    """(mask, head dimension) -> plan, once per batch, on the CPU. This and its plans can be pickled, for a worker."""
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]
    """(q [T, N, H], k [K, M, H], v [K, M, H], plan) -> [T, N, H]."""
    place: Callable[[Any], Any] = lambda plan: plan
    """A plan, where `run` wants it."""
    has_backward: bool = True


def _plan_host(codes: AttentionCodes, head: int) -> HostPlan:
    return plan_host(codes)


def _run_host(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: HostPlan) -> torch.Tensor:
    return host_attention(q.cpu(), k.cpu(), v.cpu(), plan).to(q.device)


HOST = AttentionEngine("host", _plan_host, _run_host)


def choose_attention(config: Config) -> AttentionEngine:
    """The engine that `parallel.attention` names, or the best for this device. Says in the log which one, and why.

    Raises UserError when the one that was asked for cannot run here.
    """
    cuda, dtype, name = current_device().type == "cuda", parameter_dtype(config), config.parallel.attention
    wanted, why = name, "asked for"
    if name == "auto":
        name, why = ("triton", "kernels for this GPU") if cuda else ("host", "this is a CPU")
    lacking = {"triton": partial(_lacking_triton, config), "fa4": partial(lacking_fa4, dtype)}
    if name in lacking and (reason := lacking[name]()):
        if wanted != "auto":
            raise UserError(f"parallel.attention={name}: {reason}. Or use auto: the best engine of this machine.")
        name, why = "flex", reason
    logger.info("attention engine: %s (%s)", name, why)
    if name == "host" and cuda:
        logger.warning("attention engine host computes on the CPU: every layer copies there and back, for checks only")
    makers = {"host": lambda: HOST, "flex": _flex, "fa4": _fa4, "triton": lambda: _triton(config)}
    return makers[name]()


def _to_device(plan: Any) -> Any:
    return plan.to(current_device())


def _plan_flex(codes: AttentionCodes, head: int, rows: int) -> FlexPlan:
    return plan_flex(codes, rows)


def _flex() -> AttentionEngine:
    plan = partial(_plan_flex, rows=BLOCK)
    return AttentionEngine("flex", plan, flex_attention_packed, _to_device, current_device().type == "cuda")


def _fa4() -> AttentionEngine:
    plan = partial(_plan_flex, rows=FA4_BLOCK_ROWS[torch.cuda.get_device_capability()[0]])
    return AttentionEngine("fa4", plan, partial(flex_attention_packed, backend="FLASH"), _to_device)


def _lacking_triton(config: Config) -> str:
    """Why the kernels cannot run this model here; empty if they can."""
    model = config.model
    heads = {"the model (model.head_dim, else hidden / heads)": model.kv_channels}
    if model.visual_und:
        heads["the ViT (model.vit.hidden / model.vit.heads)"] = config.model.vit.head_dim
    unfit = (f"{who} has {reason}" for who, head in heads.items() if (reason := lacking_head(head)))
    return lacking_here(parameter_dtype(config), model.kv_channels) or next(unfit, "")


def _plan_triton(codes: AttentionCodes, head: int, configs: dict[int, Configs]) -> TritonPlan:
    return plan_triton(codes, configs[head])


def _triton(config: Config) -> AttentionEngine:
    """Configurations are looked up here, once: a worker that makes plans sees no GPU."""
    heads = config.model.kv_channels, config.model.vit.head_dim
    configs = {head: configs_here(parameter_dtype(config), head) for head in heads}
    return AttentionEngine("triton", partial(_plan_triton, configs=configs), triton_attention, _to_device)


def attend_across(plan: Any, engine: AttentionEngine, cp: Axis | None = None) -> Attend:
    """Attention of this rank's queries to the keys of every context-parallel rank; without `cp`, of this rank alone.

    plan: made by `engine.plan` of the mask of these queries and keys.
    """
    plan = engine.place(plan)

    def attend(q_TNH: torch.Tensor, k_TMH: torch.Tensor, v_TMH: torch.Tensor) -> torch.Tensor:
        if cp is not None and cp.size > 1:
            k_KMH, v_KMH = join_over_cp(torch.cat([k_TMH, v_TMH], 1), cp).chunk(2, 1)
            return engine.run(q_TNH, k_KMH, v_KMH, plan)
        return engine.run(q_TNH, k_TMH, v_TMH, plan)

    return attend


def every_layer(attend: Attend) -> LayerAttend:
    """The same attention in all layers: training has no KV cache."""
    return lambda layer: attend


def join_over_cp(x: torch.Tensor, cp: Axis) -> torch.Tensor:
    """Rows of every rank, one after the other; backward sums gradients over ranks and hands each its rows."""
    if cp.size == 1:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=cp.group)

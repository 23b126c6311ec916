"""Attention under the mask of a batch: choice of the engine, and context parallelism by gathering keys and values.

Queries stay on their rank. With grouped queries K and V are small beside the hidden state, so those of all ranks are
gathered in one collective; the mask's ranges, which carry the sequence order, make any placement of rows correct.

Letters: T rows of this context-parallel rank, K rows of all of them; N query heads and M key/value heads of this
tensor-parallel rank, H head dim.
"""

import logging
from typing import Any

import torch
from megabagel_kernels.attention.engines import ENGINES, HOST, AttentionEngine, PlanT, make_engine
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.model.inputs import Attend, LayerAttend
from megabagel.parallel.megatron import parameter_dtype
from megabagel.parallel.mesh import Axis
from megabagel.runtime.device import current_device

__all__ = ["HOST", "AttentionEngine", "attend_across", "choose_attention", "join_over_cp"]

logger = logging.getLogger(__name__)


def choose_attention(config: Config) -> AttentionEngine[Any]:
    """The engine that `parallel.attention` names, or the best one for this device. Logs which one, and why.

    Raises:
        UserError: the engine that was asked for cannot run here.
    """
    device, dtype, name = current_device(), parameter_dtype(config), config.parallel.attention
    wanted, why, cuda = name, "asked for", device.type == "cuda"
    if name == "auto":
        name, why = ("triton", "kernels for this GPU") if cuda else ("host", "this is a CPU")
    if reason := ENGINES[name].why_unavailable(dtype, _head_dims(config)):
        if wanted != "auto":
            raise UserError(f"parallel.attention={name}: {reason}. Or use auto: the best engine of this machine.")
        name, why = "flex", reason
    logger.info("attention engine: %s (%s)", name, why)
    if name == "host" and cuda:
        logger.warning("attention engine host computes on the CPU: every layer copies there and back, for checks only")
    return make_engine(name, dtype, _head_dims(config), device)


def _head_dims(config: Config) -> dict[str, int]:
    """Head dims that this model plans, by who has them; as `why_unavailable` of an engine words it."""
    model = config.model
    head_dims = {"the model (model.head_dim, else hidden / heads)": model.kv_channels}
    if model.visual_und:
        head_dims["the ViT (model.vit.hidden / model.vit.heads)"] = config.model.vit.head_dim
    return head_dims


def attend_across(plan: PlanT, engine: AttentionEngine[PlanT], cp: Axis | None = None) -> Attend:
    """Attention of this rank's queries to the keys of every context-parallel rank; without `cp`, of this rank alone.

    plan: made by `engine.plan` for the mask of these queries and keys.
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
    """Rows of every rank, one after the other; backward sums gradients over ranks and gives each rank its rows."""
    if cp.size == 1:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=cp.group)

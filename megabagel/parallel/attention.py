"""Choice of the attention engine, and context parallelism by all-gather of keys and values.

Queries stay on their rank; keys and values of all context-parallel ranks are gathered in one collective. With grouped
queries they are small beside the hidden states. The attention ranges of the mask carry the sequence order, so the
result is exact whatever rows a rank holds.

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
    """Return the engine of `parallel.attention`, or for "auto" the best one on this device; log it with the reason.

    Raises:
        UserError: an engine was named that cannot run on this machine.
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
    """Return the head dims of this model by the name that an engine's error message gives them."""
    model = config.model
    head_dims = {"the model (model.head_dim, else hidden / heads)": model.kv_channels}
    if model.visual_und:
        head_dims["the ViT (model.vit.hidden / model.vit.heads)"] = config.model.vit.head_dim
    return head_dims


def attend_across(plan: PlanT, engine: AttentionEngine[PlanT], cp: Axis | None = None) -> Attend:
    """Return the attention function of one batch, for this rank's queries.

    Args:
        plan: made by `engine.plan` for the mask of these queries and keys.
        engine: the attention engine.
        cp: context-parallel axis, whose ranks' keys are gathered; None: keys of this rank alone (ViT).
    """
    # Once per batch: all layers use the same block schedule on the device.
    plan = engine.place(plan)

    def attend(q_TNH: torch.Tensor, k_TMH: torch.Tensor, v_TMH: torch.Tensor) -> torch.Tensor:
        # Keys and values are concatenated along the heads so that one all-gather serves both.
        if cp is not None and cp.size > 1:
            k_KMH, v_KMH = join_over_cp(torch.cat([k_TMH, v_TMH], 1), cp).chunk(2, 1)
            return engine.run(q_TNH, k_KMH, v_KMH, plan)
        return engine.run(q_TNH, k_TMH, v_TMH, plan)

    return attend


def every_layer(attend: Attend) -> LayerAttend:
    """Return a function that gives every layer the same attention, as in training, where there is no KV cache."""
    return lambda layer: attend


def join_over_cp(x: torch.Tensor, cp: Axis) -> torch.Tensor:
    """All-gather rows over context-parallel ranks, end to end; backward is a reduce-scatter of the gradients."""
    if cp.size == 1:
        return x
    # megatron-core's sequence-parallel gather is the same operation on another group. `tensor_parallel_output_grad`
    # selects the reduce-scatter backward: every rank's queries contribute to the gradient of a key.
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=cp.group)

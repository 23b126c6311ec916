"""One protocol for every implementation of attention under the mask, and the four implementations.

    engine = make_engine("triton", torch.bfloat16, {"the model": 128}, torch.device("cuda"))
    plan = engine.plan(ranges, 128)              # once per batch, on the CPU, for example in a loader worker
    plan = engine.place(plan)                    # where `run` needs it
    out_TNH = engine.run(q_TNH, k_KMH, v_KMH, plan)  # in every layer

All engines give the same result up to rounding.

Letters: T queries, K keys, N query heads, M key/value heads, H head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from megabagel_kernels.attention.configs import (
    Configs,
    configs_here,
    why_unavailable_head_dim,
    why_unavailable_here,
)
from megabagel_kernels.attention.flex import (
    BLOCK,
    FA4_BLOCK_ROWS,
    FlexPlan,
    flex_attention_packed,
    plan_flex,
    why_unavailable_fa4,
)
from megabagel_kernels.attention.host import HostPlan, host_attention, plan_host
from megabagel_kernels.attention.mask import AttentionRanges
from megabagel_kernels.attention.triton import TritonPlan, plan_triton, triton_attention

AttentionPlan = HostPlan | FlexPlan | TritonPlan
"""Plan of some engine. Plans are plain tensors and numbers, so a loader worker can pickle them."""

PlanT = TypeVar("PlanT")


class AttentionEngine(Protocol[PlanT]):
    """One implementation of attention under a mask. Engines can be pickled, for loader workers that make plans."""

    @property
    def name(self) -> str:
        """Value of `parallel.attention` that selects it."""

    @property
    def has_backward(self) -> bool:
        """Whether `run` is differentiable on this engine's device."""

    @staticmethod
    def why_unavailable(dtype: torch.dtype, head_dims: Mapping[str, int]) -> str:
        """Why the engine cannot run in this process; empty if it can. See `make_engine` for the arguments."""

    def plan(self, ranges: AttentionRanges, head_dim: int) -> PlanT:
        """Plan a mask for heads of this dim, on the CPU."""

    def place(self, plan: PlanT) -> PlanT:
        """The plan on the device where `run` needs it."""

    def run(self, q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: PlanT) -> Tensor:
        """[T, N, H] attention under the plan's mask, 0 for queries that see nothing."""


@dataclass(frozen=True)
class HostEngine:
    """torch's CPU flash kernel, tile by tile. On a GPU it copies to the CPU and back in every layer: for checks."""

    name: ClassVar[str] = "host"
    has_backward: ClassVar[bool] = True

    @staticmethod
    def why_unavailable(dtype: torch.dtype, head_dims: Mapping[str, int]) -> str:
        """Runs everywhere."""
        return ""

    def plan(self, ranges: AttentionRanges, head_dim: int) -> HostPlan:
        """See `AttentionEngine`."""
        return plan_host(ranges)

    def place(self, plan: HostPlan) -> HostPlan:
        """Stays on the CPU."""
        return plan

    def run(self, q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: HostPlan) -> Tensor:
        """See `AttentionEngine`."""
        return host_attention(q_TNH.cpu(), k_KMH.cpu(), v_KMH.cpu(), plan).to(q_TNH.device)


@dataclass(frozen=True)
class FlexEngine:
    """torch's FlexAttention."""

    device: torch.device

    name: ClassVar[str] = "flex"

    @property
    def has_backward(self) -> bool:
        """torch has none on a CPU."""
        return self.device.type == "cuda"

    @staticmethod
    def why_unavailable(dtype: torch.dtype, head_dims: Mapping[str, int]) -> str:
        """Runs everywhere."""
        return ""

    def plan(self, ranges: AttentionRanges, head_dim: int) -> FlexPlan:
        """See `AttentionEngine`."""
        return plan_flex(ranges, BLOCK)

    def place(self, plan: FlexPlan) -> FlexPlan:
        """See `AttentionEngine`."""
        return plan.to(self.device)

    def run(self, q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: FlexPlan) -> Tensor:
        """See `AttentionEngine`."""
        return flex_attention_packed(q_TNH, k_KMH, v_KMH, plan)


@dataclass(frozen=True)
class Fa4Engine:
    """FlashAttention-4 through FlexAttention."""

    device: torch.device
    rows: int
    """Queries per block that this GPU needs; stored, because a worker that plans may see no GPU."""

    name: ClassVar[str] = "fa4"
    has_backward: ClassVar[bool] = True

    @staticmethod
    def why_unavailable(dtype: torch.dtype, head_dims: Mapping[str, int]) -> str:
        """See `AttentionEngine`."""
        return why_unavailable_fa4(dtype)

    def plan(self, ranges: AttentionRanges, head_dim: int) -> FlexPlan:
        """See `AttentionEngine`."""
        return plan_flex(ranges, self.rows)

    def place(self, plan: FlexPlan) -> FlexPlan:
        """See `AttentionEngine`."""
        return plan.to(self.device)

    def run(self, q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: FlexPlan) -> Tensor:
        """See `AttentionEngine`."""
        return flex_attention_packed(q_TNH, k_KMH, v_KMH, plan, backend="FLASH")


@dataclass(frozen=True)
class TritonEngine:
    """Our Triton kernels, on a GPU or in Triton's interpreter."""

    device: torch.device
    configs: Mapping[int, Configs]
    """By head dim; stored, because a worker that plans may see no GPU."""

    name: ClassVar[str] = "triton"
    has_backward: ClassVar[bool] = True

    @staticmethod
    def why_unavailable(dtype: torch.dtype, head_dims: Mapping[str, int]) -> str:
        """See `AttentionEngine`."""
        for owner, head_dim in head_dims.items():
            if reason := why_unavailable_here(dtype, head_dim):
                return reason
            if reason := why_unavailable_head_dim(head_dim):
                return f"{owner} has {reason}"
        return ""

    def plan(self, ranges: AttentionRanges, head_dim: int) -> TritonPlan:
        """See `AttentionEngine`."""
        return plan_triton(ranges, self.configs[head_dim])

    def place(self, plan: TritonPlan) -> TritonPlan:
        """See `AttentionEngine`."""
        return plan.to(self.device)

    def run(self, q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: TritonPlan) -> Tensor:
        """See `AttentionEngine`."""
        return triton_attention(q_TNH, k_KMH, v_KMH, plan)


HOST = HostEngine()

ENGINES = {engine.name: engine for engine in (HostEngine, FlexEngine, Fa4Engine, TritonEngine)}
"""Engine classes by name."""


def make_engine(
    name: str, dtype: torch.dtype, head_dims: Mapping[str, int], device: torch.device
) -> AttentionEngine[Any]:
    """The engine of this name, ready to plan and run.

    Args:
        name: a key of `ENGINES`.
        dtype: of queries, keys and values.
        head_dims: head dims that will be planned, by who has them (for the message): "the model", "the ViT".
        device: of queries, keys and values.

    Raises:
        ValueError: the engine cannot run in this process; the message is the engine's `why_unavailable`.
    """
    if reason := ENGINES[name].why_unavailable(dtype, head_dims):
        raise ValueError(reason)
    if name == "host":
        return HOST
    if name == "flex":
        return FlexEngine(device)
    if name == "fa4":
        return Fa4Engine(device, FA4_BLOCK_ROWS[torch.cuda.get_device_capability()[0]])
    return TritonEngine(device, {head_dim: configs_here(dtype, head_dim) for head_dim in head_dims.values()})

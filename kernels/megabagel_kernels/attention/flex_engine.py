"""torch's FlexAttention under the same mask: block lists from our schedule, no mask evaluated to find them.

A well-kept rival, and the engine for GPUs without our kernels. On a CPU it is for checks of the forward pass: torch
computes all pairs there and has no backward.

Letters: T queries, S keys, N query heads, M key/value heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megabagel_kernels.attention.mask import AttentionCodes, check
from megabagel_kernels.attention.schedule import FULL, PARTIAL, Kinds, classify

BLOCK = 128


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """Made once per batch; serves every layer and any number of heads."""

    mask: BlockMask
    queries: int
    keys: int


def plan_flex(codes: AttentionCodes, device: torch.device | str = "cpu") -> FlexPlan:
    """Plan attention for a mask. Raises ValueError on codes that `mask.check` refuses."""
    check(codes)
    kinds = classify(codes, BLOCK, BLOCK)
    code_S, *bounds = (torch.from_numpy(x).to(device) for x in (codes.key_code, codes.a0, codes.a1, codes.b0, codes.b1))
    a0_T, a1_T, b0_T, b1_T = bounds

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        code = code_S[key]
        public = (a0_T[query] <= code) & (code < a1_T[query])
        return public | ((b0_T[query] <= code) & (code < b1_T[query]))

    mask = BlockMask.from_kv_blocks(
        *_lists(kinds, PARTIAL, device),
        *_lists(kinds, FULL, device),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
        seq_lengths=(codes.queries, codes.keys),
    )
    return FlexPlan(mask, codes.queries, codes.keys)


def _lists(kinds: Kinds, kind: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Number of key blocks of a kind by query block [1, 1, B], and their numbers, first in their row [1, 1, B, C]."""
    chosen = kinds == kind
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    count = chosen.sum(1).astype(np.int32)
    return torch.from_numpy(count)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)


def flex_attention_packed(
    q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, plan: FlexPlan, scale: float | None = None
) -> Tensor:
    """Attention under the plan's mask, [T, N, H]; 0 for queries that see nothing. `scale`: default 1 / sqrt(H).

    Raises ValueError if shapes do not fit the plan, or for gradients on a CPU.
    """
    for name, x, rows in (("q", q_TNH, plan.queries), ("k", k_SMH, plan.keys), ("v", v_SMH, plan.keys)):
        if x.dim() != 3 or len(x) != rows:
            raise ValueError(f"{name}: the plan is for [{rows}, heads, head dim], found {[*x.shape]}")
    if not q_TNH.is_cuda and torch.is_grad_enabled() and (q_TNH.requires_grad or k_SMH.requires_grad):
        raise ValueError("FlexAttention has no backward on a CPU; run without gradients, or use the host engine")
    heads_first = (x.transpose(0, 1)[None] for x in (q_TNH, k_SMH, v_SMH))
    gqa = q_TNH.shape[1] != k_SMH.shape[1]
    out = _kernel(q_TNH.is_cuda)(*heads_first, block_mask=plan.mask, scale=scale, enable_gqa=gqa)
    return out[0].transpose(0, 1)


@cache
def _kernel(compiled: bool) -> Callable[..., Tensor]:
    """Fused on a GPU; on a CPU as it stands, so that no compiler is needed."""
    kernel: Any = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
    return kernel

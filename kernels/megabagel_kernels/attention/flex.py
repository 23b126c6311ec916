"""Attention by torch's FlexAttention, with block lists from `schedule` instead of `create_block_mask`.

The engine for GPUs that our Triton kernels have no configurations for, and the baseline in benchmarks. With `backend`
FLASH torch passes the same mask and lists to FlashAttention-4 instead of its own Triton template. On a CPU torch
computes all pairs and has no backward, which is enough to check the forward pass.

Letters: T queries, K keys, N query heads, M key/value heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megabagel_kernels.attention.mask import AttentionRanges, check
from megabagel_kernels.attention.schedule import FULL, PARTIAL, Kinds, classify

BLOCK = 128

Backend = Literal["AUTO", "FLASH"]
"""Torch's own kernel for this device, or FlashAttention-4."""

FA4_PACKAGE = "flash_attn.cute"
"""Package that torch looks for before it uses FlashAttention-4 (`ensure_flash_available` in its flex backend)."""

FA4_BLOCK_ROWS = {9: 128, 10: 256, 11: 256}
"""Queries per block that FlashAttention-4 needs, by major compute capability: Blackwell takes two tiles at a time."""


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """Made once per batch; serves every layer and any number of heads. Plain tensors, so it can be pickled."""

    queries: int
    keys: int
    block: tuple[int, int]
    ranges: tuple[Tensor, ...]  # int32: key_code [K]; the four bounds of `AttentionRanges.of_queries` [T]
    lists: tuple[Tensor, Tensor, Tensor, Tensor]  # int32: counts and indices of partial, then of full key blocks

    def to(self, device: torch.device | str) -> "FlexPlan":
        """The same plan with its tensors on `device`."""
        partial_count, partial, full_count, full = (x.to(device) for x in self.lists)
        ranges = tuple(x.to(device) for x in self.ranges)
        return replace(self, ranges=ranges, lists=(partial_count, partial, full_count, full))

    @cached_property
    def mask(self) -> BlockMask:
        """The plan as torch's BlockMask."""
        code_S, start_T, stop_T, private_start_T, private_stop_T = self.ranges

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            code = code_S[key]
            public = (start_T[query] <= code) & (code < stop_T[query])
            return public | ((private_start_T[query] <= code) & (code < private_stop_T[query]))

        lengths = self.queries, self.keys
        return BlockMask.from_kv_blocks(*self.lists, BLOCK_SIZE=self.block, mask_mod=visible, seq_lengths=lengths)


def plan_flex(ranges: AttentionRanges, rows: int = BLOCK) -> FlexPlan:
    """Plan attention for a mask, on the CPU, in blocks of `rows` queries.

    Raises ValueError for a mask that `mask.check` refuses.
    """
    check(ranges)
    kinds = classify(ranges, rows, BLOCK)
    tensors = tuple(torch.from_numpy(x) for x in (ranges.key_code, *ranges.of_queries))
    lists = (*_lists(kinds, PARTIAL), *_lists(kinds, FULL))
    return FlexPlan(ranges.queries, ranges.keys, (rows, BLOCK), tensors, lists)


def _lists(kinds: Kinds, kind: int) -> tuple[Tensor, Tensor]:
    """Per query block, how many key blocks are of a kind [1, 1, query blocks], and which, first in their row of
    [1, 1, query blocks, key blocks]: the arguments of `BlockMask.from_kv_blocks`."""
    chosen = kinds == kind
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    count = chosen.sum(1).astype(np.int32)
    return torch.from_numpy(count)[None, None], torch.from_numpy(order)[None, None]


def flex_attention_packed(
    q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: FlexPlan, scale: float | None = None, backend: Backend = "AUTO"
) -> Tensor:
    """Attention under the plan's mask.

    Args:
        q_TNH: [T, N, H] queries.
        k_KMH: [K, M, H] keys; M divides N.
        v_KMH: [K, M, H] values.
        plan: of a mask with T queries and K keys, on the device of the inputs.
        scale: of the scores; default 1 / sqrt(H).
        backend: FLASH needs a process where `why_unavailable_fa4` is empty and a plan with `FA4_BLOCK_ROWS` rows.

    Returns:
        [T, N, H], 0 for queries that see nothing.

    Raises:
        ValueError: shapes do not fit the plan, or a gradient is needed on a CPU.
    """
    for name, x, rows in (("q", q_TNH, plan.queries), ("k", k_KMH, plan.keys), ("v", v_KMH, plan.keys)):
        if x.dim() != 3 or len(x) != rows:
            raise ValueError(f"{name}: the plan is for [{rows}, heads, head dim], found {[*x.shape]}")
    if not q_TNH.is_cuda and torch.is_grad_enabled() and (q_TNH.requires_grad or k_KMH.requires_grad):
        raise ValueError("FlexAttention has no backward on a CPU; run without gradients, or use the host engine")
    heads_first = (x.transpose(0, 1)[None] for x in (q_TNH, k_KMH, v_KMH))
    gqa = q_TNH.shape[1] != k_KMH.shape[1]
    options = None if backend == "AUTO" else {"BACKEND": backend}
    kernel = _kernel(q_TNH.is_cuda)
    out = kernel(*heads_first, block_mask=plan.mask, scale=scale, enable_gqa=gqa, kernel_options=options)
    return out[0].transpose(0, 1)


@cache
def _kernel(compiled: bool) -> Callable[..., Tensor]:
    """Compiled on a GPU; eager on a CPU, so that no C++ compiler is needed."""
    kernel: Any = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
    return kernel


def why_unavailable_fa4(dtype: torch.dtype) -> str:
    """Why FlashAttention-4 cannot run in this process on tensors of this dtype; empty if it can."""
    if find_spec("flash_attn") is None or find_spec(FA4_PACKAGE) is None:
        return "FlashAttention-4 is not installed: pip install --pre flash-attn-4 (flash-attn-4[cu13] for CUDA 13)"
    if not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major not in FA4_BLOCK_ROWS:
        return f"the GPU has compute capability {major}.{minor}, FlashAttention-4 needs 9, 10 or 11"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention-4 computes in bf16 or fp16, the model in {str(dtype).removeprefix('torch.')}"
    return ""

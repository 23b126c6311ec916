"""torch's FlexAttention under the same mask: block lists from our schedule, no mask evaluated to find them.

A well-kept rival, and the engine for GPUs without our kernels. With `backend` FLASH torch hands the same mask and lists
to FlashAttention-4 instead of its Triton template. On a CPU it is for checks of the forward pass: torch computes all
pairs there and has no backward.

Letters: T queries, S keys, N query heads, M key/value heads, H head dim.
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

from megabagel_kernels.attention.mask import AttentionCodes, check
from megabagel_kernels.attention.schedule import FULL, PARTIAL, Kinds, classify

BLOCK = 128

Backend = Literal["AUTO", "FLASH"]
"""Torch's own kernel for this device, or FlashAttention-4."""

FA4_PACKAGE = "flash_attn.cute"
"""What torch looks for before it uses FlashAttention-4 (its `ensure_flash_available`)."""

FA4_BLOCK_ROWS = {9: 128, 10: 256, 11: 256}
"""Queries of a block that FlashAttention-4 wants, by major compute capability: Blackwell takes two tiles at a time."""


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """Made once per batch; serves every layer and any number of heads. Plain tensors, so it can be pickled."""

    queries: int
    keys: int
    block: tuple[int, int]
    codes: tuple[Tensor, ...]  # int32: key_code [S]; a0, a1, b0, b1 [T]
    lists: tuple[Tensor, Tensor, Tensor, Tensor]  # int32: counts and numbers of partial, then of full key blocks

    def to(self, device: torch.device | str) -> "FlexPlan":
        """The same plan with its tensors on `device`."""
        partial_count, partial, full_count, full = (x.to(device) for x in self.lists)
        codes = tuple(x.to(device) for x in self.codes)
        return replace(self, codes=codes, lists=(partial_count, partial, full_count, full))

    @cached_property
    def mask(self) -> BlockMask:
        """The plan in torch's words."""
        code_S, a0_T, a1_T, b0_T, b1_T = self.codes

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            code = code_S[key]
            public = (a0_T[query] <= code) & (code < a1_T[query])
            return public | ((b0_T[query] <= code) & (code < b1_T[query]))

        lengths = self.queries, self.keys
        return BlockMask.from_kv_blocks(*self.lists, BLOCK_SIZE=self.block, mask_mod=visible, seq_lengths=lengths)


def plan_flex(codes: AttentionCodes, rows: int = BLOCK) -> FlexPlan:
    """Plan attention for a mask, on the CPU, in blocks of `rows` queries.

    Raises ValueError on codes that `mask.check` refuses.
    """
    check(codes)
    kinds = classify(codes, rows, BLOCK)
    tensors = tuple(torch.from_numpy(x) for x in (codes.key_code, codes.a0, codes.a1, codes.b0, codes.b1))
    lists = (*_lists(kinds, PARTIAL), *_lists(kinds, FULL))
    return FlexPlan(codes.queries, codes.keys, (rows, BLOCK), tensors, lists)


def _lists(kinds: Kinds, kind: int) -> tuple[Tensor, Tensor]:
    """Number of key blocks of a kind by query block [1, 1, B], and their numbers, first in their row [1, 1, B, C]."""
    chosen = kinds == kind
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    count = chosen.sum(1).astype(np.int32)
    return torch.from_numpy(count)[None, None], torch.from_numpy(order)[None, None]


def flex_attention_packed(
    q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, plan: FlexPlan, scale: float | None = None, backend: Backend = "AUTO"
) -> Tensor:
    """Attention under the plan's mask, [T, N, H]; 0 for queries that see nothing. `scale`: default 1 / sqrt(H).

    `backend` FLASH wants what `lacking_fa4` asks for, and a plan with as many rows as `FA4_BLOCK_ROWS` says. Raises
    ValueError if shapes do not fit the plan, or for gradients on a CPU.
    """
    for name, x, rows in (("q", q_TNH, plan.queries), ("k", k_SMH, plan.keys), ("v", v_SMH, plan.keys)):
        if x.dim() != 3 or len(x) != rows:
            raise ValueError(f"{name}: the plan is for [{rows}, heads, head dim], found {[*x.shape]}")
    if not q_TNH.is_cuda and torch.is_grad_enabled() and (q_TNH.requires_grad or k_SMH.requires_grad):
        raise ValueError("FlexAttention has no backward on a CPU; run without gradients, or use the host engine")
    heads_first = (x.transpose(0, 1)[None] for x in (q_TNH, k_SMH, v_SMH))
    gqa = q_TNH.shape[1] != k_SMH.shape[1]
    options = None if backend == "AUTO" else {"BACKEND": backend}
    kernel = _kernel(q_TNH.is_cuda)
    out = kernel(*heads_first, block_mask=plan.mask, scale=scale, enable_gqa=gqa, kernel_options=options)
    return out[0].transpose(0, 1)


@cache
def _kernel(compiled: bool) -> Callable[..., Tensor]:
    """Fused on a GPU; on a CPU as it stands, so that no compiler is needed."""
    kernel: Any = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
    return kernel


def lacking_fa4(dtype: torch.dtype) -> str:
    """Why FlashAttention-4 cannot run in this process on tensors of this type; empty if it can."""
    if find_spec("flash_attn") is None or find_spec(FA4_PACKAGE) is None:
        return "FlashAttention-4 is not installed: pip install --pre flash-attn-4 (flash-attn-4[cu13] for CUDA 13)"
    if not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major not in FA4_BLOCK_ROWS:
        return f"the GPU has compute capability {major}.{minor}, FlashAttention-4 wants 9, 10 or 11"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention-4 computes in bf16 or fp16, the model in {str(dtype).removeprefix('torch.')}"
    return ""

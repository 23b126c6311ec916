"""Attention on a GPU by our Triton kernels: the plan, and the public functions with their checks.

The plan is made on the CPU, once per batch, and serves every layer and any number of heads, forward and backward:

    plan = plan_triton(ranges, configs_for(triton.__version__, 90, torch.bfloat16, 128)).to("cuda")
    out_TNH = triton_attention(q_TNH, k_KMH, v_KMH, plan)

Subsets of queries and keys are expressed by the ranges, so a ViT (every image a full segment), a context-parallel rank
(some keys at a time, joined by `merge.merge`) and a KV cache are the same call. Planning needs no Triton: it runs in
loader workers, which may see no GPU.

Letters: T queries, K keys, N query heads, M key/value heads, H head dim.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megabagel_kernels.attention.configs import HEAD_DIMS, Config, Configs, tile_width
from megabagel_kernels.attention.mask import PADDING, AttentionRanges, Codes, check, visible_pairs
from megabagel_kernels.attention.schedule import BlockLists, Kinds, classify
from megabagel_kernels.attention.triton_ops import attention_op
from megabagel_kernels.checks import check_device, check_dtype, check_layout, check_range, check_shape

ROW_UNIT = 128
"""Codes and ranges are padded to a multiple of this, so that kernels read the last block of any size up to it whole."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class TritonPlan:
    """Made by `plan_triton`; all tensors are on one device, `to` moves them."""

    queries: int
    keys: int
    visible: int  # visible (query, key) pairs, for FLOP counts
    configs: Configs
    tensors: tuple[Tensor, ...]  # int32: ranges [4, T_pad], code [S_pad]; work and blocks for forward, dq and dkv

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TritonPlan":
        """The same plan with its tensors on `device`."""
        return replace(self, tensors=tuple(x.to(device, non_blocking=non_blocking) for x in self.tensors))


def plan_triton(ranges: AttentionRanges, configs: Configs) -> TritonPlan:
    """Plan a mask for the kernels, on the CPU.

    `configs` holds the block sizes of the device that will run the plan. Raises ValueError for a mask that `mask.check`
    refuses.
    """
    check(ranges)
    kinds: dict[tuple[int, int], Kinds] = {}

    def lists(config: Config, by_key: bool) -> tuple[Tensor, Tensor]:
        size = config.rows, config.cols
        if size not in kinds:
            kinds[size] = classify(ranges, *size)
        made = BlockLists.of(kinds[size].T if by_key else kinds[size])
        return torch.from_numpy(made.work), torch.from_numpy(made.blocks)

    forward = lists(configs.forward, by_key=False)
    dq = lists(configs.dq, by_key=False)
    dkv = lists(configs.dkv, by_key=True)
    of_queries = torch.from_numpy(np.stack([_padded(bound, 0) for bound in ranges.of_queries]))
    code = torch.from_numpy(_padded(ranges.key_code, PADDING))
    tensors = (of_queries, code, *forward, *dq, *dkv)
    return TritonPlan(ranges.queries, ranges.keys, visible_pairs(ranges), configs, tensors)


def _padded(vector: Codes, value: int) -> Codes:
    return np.pad(vector, (0, -len(vector) % ROW_UNIT), constant_values=value)


def triton_attention(
    q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: TritonPlan, scale: float | None = None
) -> Tensor:
    """Attention under the plan's mask, with softmax and sums in fp32. The same inputs give the same bits.

    Args:
        q_TNH: [T, N, H] queries in bf16, fp16 or fp32; rows may have any stride, as slices of a fused projection have.
            Padding tokens must hold finite numbers: they are multiplied by 0.
        k_KMH: [K, M, H] keys; M divides N.
        v_KMH: [K, M, H] values.
        plan: of a mask with T queries and K keys, on the device of the inputs.
        scale: of the scores; default 1 / sqrt(H).

    Returns:
        [T, N, H] in the dtype of the inputs, 0 for queries that see nothing.

    Raises:
        ValueError: inputs do not fit each other, the plan or the kernels. Raised before any launch.
    """
    return triton_attention_lse(q_TNH, k_KMH, v_KMH, plan, scale)[0]


def triton_attention_lse(
    q_TNH: Tensor,
    k_KMH: Tensor,
    v_KMH: Tensor,
    plan: TritonPlan,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`triton_attention`, and the natural-log sum of exponentials, fp32 [N, T]: -inf for queries that see nothing.

    Both results are differentiable, so results over parts of the keys can be merged (`merge.merge`).

    Args:
        q_TNH: see `triton_attention`, as k_KMH, v_KMH, plan and scale.
        k_KMH: [K, M, H] keys.
        v_KMH: [K, M, H] values.
        plan: of the mask.
        scale: of the scores.
        out_dtype: of the first result; default that of the inputs. fp32 merges without rounding the parts first.
    """
    scale = q_TNH.shape[-1] ** -0.5 if scale is None else scale
    _check(q_TNH, k_KMH, v_KMH, plan, scale)
    out_dtype = q_TNH.dtype if out_dtype is None else out_dtype
    if out_dtype not in (q_TNH.dtype, torch.float32):
        raise ValueError(f"out_dtype is {out_dtype}, expected {q_TNH.dtype} (as q) or torch.float32")
    numbers = plan.configs.numbers()
    return attention_op(q_TNH, k_KMH, v_KMH, list(plan.tensors), numbers, plan.visible, scale, out_dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: TritonPlan, scale: float) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (tokens, heads, head dim)")
    kv_heads, head_dim = k.shape[1:]
    check_shape("q", q, (plan.queries, q.shape[1], head_dim))
    check_shape("k", k, (plan.keys, kv_heads, head_dim))
    check_shape("v", v, (plan.keys, kv_heads, head_dim))
    if kv_heads == 0 or q.shape[1] == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads and k {kv_heads}, expected a multiple of the latter")
    check_range("head dim", head_dim, HEAD_DIMS[0], HEAD_DIMS[-1])
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head dim is {head_dim}, expected a multiple of {HEAD_DIMS.step}")
    if plan.configs.descriptors and head_dim != tile_width(head_dim):
        raise ValueError(f"head dim is {head_dim}, the plan is for head dims such as {tile_width(head_dim)}")
    check_dtype("q", q, *DTYPES)
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    check_device(q, k=k, v=v, plan=plan.tensors[0])
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}, expected a positive finite number")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_layout(name, x, inner=2)
        _check_rows(name, x, plan.configs.descriptors)
    _check_offsets(q, k, plan)


def _check_rows(name: str, x: Tensor, descriptors: bool) -> None:
    """Rows do not overlap; with descriptors (TMA) rows start at multiples of 16 bytes."""
    length, heads, head_dim = x.shape
    if length > 1 and x.stride(0) < heads * head_dim:
        raise ValueError(f"{name} has stride {x.stride(0)} between rows, expected at least {heads * head_dim}")
    if descriptors:
        apart, start = (number * x.element_size() for number in (x.stride(0), x.storage_offset()))
        if length > 1 and apart % 16:
            raise ValueError(f"{name} has {apart} bytes from row to row, expected a multiple of 16")
        if start % 16:
            raise ValueError(f"{name} starts {start} bytes into its storage, expected a multiple of 16")


def _check_offsets(q: Tensor, k: Tensor, plan: TritonPlan) -> None:
    """Offsets into results, row statistics and partial sums of dk and dv fit int32, as those into the inputs."""
    heads, head_dim = q.shape[1:]
    padded = plan.tensors[0].shape[1]
    for name, size in (
        ("q", len(q) * heads * head_dim),
        ("k times the heads of q", len(k) * heads * head_dim),
        ("the row statistics", 2 * heads * padded),
    ):
        check_range(f"number of elements of {name}", size, 0, 2**31 - 1)

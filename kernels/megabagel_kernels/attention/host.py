"""The CPU engine: exact attention per split, without a dense T x S mask.

Keys are sorted by code once per call, so that every interval of the mask is a contiguous slice of them. Queries with
equal intervals form one call on their keys; causal runs form one call whose last keys are masked. Forward and backward
loop over the same calls and accumulate into slices: autograd through slices would fill a whole-size tensor for each.

Legend: T queries, S keys, N query heads, M key/value heads, G = N / M, H head dimension, R rows and K keys of a call.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megabagel_kernels.attention.mask import AttentionCodes


@dataclass(frozen=True)
class Call:
    """Queries [start, stop) of the planned order on one or two slices of the sorted keys.

    hidden_RK: bool, true where a causal query does not see the key; None if all see all.
    """

    start: int
    stop: int
    keys: tuple[slice, ...]
    hidden_RK: torch.Tensor | None


@dataclass(frozen=True)
class HostPlan:
    """Made once per batch by `plan_host`, used by every layer, forward and backward.

    query_T: planned order of the queries, those that see nothing last. key_S: keys by code, padding first.
    """

    query_T: torch.Tensor
    key_S: torch.Tensor
    calls: tuple[Call, ...]


def plan_host(codes: AttentionCodes, max_rows: int = 1024) -> HostPlan:
    """Plan the calls of a mask. Long causal runs are cut into `max_rows` rows, which bounds their masks."""
    key_S = np.argsort(codes.key_code, kind="stable")
    ordered = codes.key_code[key_S]
    a0, a1, b0, b1 = (np.searchsorted(ordered, bound) for bound in (codes.a0, codes.a1, codes.b0, codes.b1))
    a1, b1 = np.maximum(a0, a1), np.maximum(b0, b1)
    blind = (a0 == a1) & (b0 == b1)
    query_T = np.lexsort((a1, b1, b0, a0, blind))
    bounds = np.stack([a0, a1, b0, b1], 1)[query_T]
    seeing = len(query_T) - int(blind.sum())
    calls = tuple(_call(bounds, start, stop) for start, stop in _runs(bounds[:seeing], max_rows))
    return HostPlan(torch.from_numpy(query_T), torch.from_numpy(key_S), calls)


def _runs(bounds: np.ndarray, max_rows: int) -> Iterator[tuple[int, int]]:
    """Cut queries where (a0, b0, b1) change, and where constant a1 (full) meets rising a1 (causal)."""
    if not len(bounds):
        return
    steps = np.diff(bounds, axis=0)
    rising = steps[:, 1] != 0
    new_split = (steps[:, [0, 2, 3]] != 0).any(1)
    turns = np.zeros_like(new_split)
    turns[1:] = rising[1:] != rising[:-1]
    borders = [0, *(np.flatnonzero(new_split | turns) + 1), len(bounds)]
    for start, stop in pairwise(borders):
        for first in range(start, stop, max_rows):
            yield first, min(first + max_rows, stop)


def _call(bounds: np.ndarray, start: int, stop: int) -> Call:
    a0, a1, b0, b1 = bounds[start:stop].T
    keys = tuple(slice(low, high) for low, high in ((int(a0[0]), int(a1[-1])), (int(b0[0]), int(b1[0]))) if low < high)
    hidden_RK = None
    if a1[0] != a1[-1]:
        index_K = np.concatenate([np.arange(part.start, part.stop) for part in keys])
        hidden_RK = torch.from_numpy((index_K >= a1[:, None]) & (index_K < a1[-1]))
    return Call(start, stop, keys, hidden_RK)


def host_attention(
    q_TNH: torch.Tensor, k_SMH: torch.Tensor, v_SMH: torch.Tensor, plan: HostPlan, scale: float | None = None
) -> torch.Tensor:
    """out [T, N, H] in the type of q; products in fp32. Queries that see nothing give 0."""
    return _HostAttention.apply(q_TNH, k_SMH, v_SMH, plan, scale or q_TNH.shape[-1] ** -0.5)


def _grouped(x_TNH: torch.Tensor, order: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[T, N, H] -> fp32 [M, T, G, H] in the given order of rows, heads of a group side by side."""
    rows = x_TNH.float()[order]
    return rows.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous()


def _ungrouped(x_MTGH: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The inverse of `_grouped`."""
    rows = x_MTGH.transpose(0, 1).flatten(1, 2)
    return torch.empty_like(rows).index_copy_(0, order, rows)


def _gather(x_MSH: torch.Tensor, keys: tuple[slice, ...]) -> torch.Tensor:
    """[M, K, H]: the keys of a call."""
    return x_MSH[:, keys[0]] if len(keys) == 1 else torch.cat([x_MSH[:, part] for part in keys], 1)


def _scatter(into_MSH: torch.Tensor, keys: tuple[slice, ...], x_MKH: torch.Tensor) -> None:
    """Add the gradients of a call's keys in place."""
    sizes = [part.stop - part.start for part in keys]
    for part, piece in zip(keys, x_MKH.split(sizes, 1), strict=True):
        into_MSH[:, part] += piece


def _scores(q_MRGH: torch.Tensor, k_MKH: torch.Tensor, call: Call, scale: float) -> torch.Tensor:
    """Scaled, masked scores [M, R * G, K]."""
    scores = torch.baddbmm(q_MRGH.new_empty(()), q_MRGH.flatten(1, 2), k_MKH.mT, beta=0, alpha=scale)
    if call.hidden_RK is not None:
        rows = call.stop - call.start
        scores.unflatten(1, (rows, -1)).masked_fill_(call.hidden_RK[:, None], -torch.inf)
    return scores


class _HostAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TNH: torch.Tensor, k_SMH: torch.Tensor, v_SMH: torch.Tensor, plan: HostPlan, scale: float
    ) -> torch.Tensor:
        kv_heads = k_SMH.shape[1]
        q = _grouped(q_TNH, plan.query_T, kv_heads)
        k, v = (_grouped(x, plan.key_S, kv_heads)[:, :, 0] for x in (k_SMH, v_SMH))
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
        for call in plan.calls:
            rows = slice(call.start, call.stop)
            scores = _scores(q[:, rows], _gather(k, call.keys), call, scale)
            norm = scores.logsumexp(-1)
            weights = scores.sub_(norm[..., None]).exp_()
            out[:, rows] = torch.bmm(weights, _gather(v, call.keys)).view_as(q[:, rows])
            lse[:, rows] = norm.view_as(lse[:, rows])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.dtypes = plan, scale, (q_TNH.dtype, k_SMH.dtype, v_SMH.dtype)
        return _ungrouped(out, plan.query_T).to(q_TNH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TNH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        grad = _grouped(grad_TNH, plan.query_T, k.shape[0])
        delta = (grad * out).sum(-1)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for call in plan.calls:
            rows = slice(call.start, call.stop)
            q_part, grad_part = q[:, rows].flatten(1, 2), grad[:, rows].flatten(1, 2)
            k_part, v_part = _gather(k, call.keys), _gather(v, call.keys)
            weights = _scores(q[:, rows], k_part, call, scale).sub_(lse[:, rows].flatten(1)[..., None]).exp_()
            _scatter(dv, call.keys, torch.bmm(weights.mT, grad_part))
            slope = torch.bmm(grad_part, v_part.mT).sub_(delta[:, rows].flatten(1)[..., None]).mul_(weights).mul_(scale)
            dq[:, rows] = torch.bmm(slope, k_part).view_as(q[:, rows])
            _scatter(dk, call.keys, torch.bmm(slope.mT, q_part))
        types = ctx.dtypes
        return (
            _ungrouped(dq, plan.query_T).to(types[0]),
            _ungrouped(dk[:, :, None], plan.key_S).to(types[1]),
            _ungrouped(dv[:, :, None], plan.key_S).to(types[2]),
            None,
            None,
        )

"""Attention on a CPU: a few dozen calls of torch's flash-attention kernel per pack, one per tile of the mask.

The plan is made once per batch. Each layer gathers queries, keys and values into the plan's order (unless they are in
it already), calls torch's CPU flash kernel on slices of them (it handles grouped queries), and gathers the outputs
back. Dense attention with a mask would compute all T x S pairs, of which packs have 6 to 12 percent (docs/kernels.md).

Backward loops over the same tiles and adds the gradients of keys and values into their slices. Autograd through slices
would instead fill a tensor of full size for each tile and add them up.

Letters: T queries, K keys, t and s those of a tile, B its batch; N query heads, M key/value heads, H head dim.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabagel_kernels.attention.mask import AttentionRanges, check
from megabagel_kernels.attention.tiling import cut_into_tiles

# Private operators of torch: scaled_dot_product_attention calls them on a CPU, but does not return the logsumexp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, eq=False)
class Order:
    """A permutation of some tokens of a pack into the plan's order, and its inverse."""

    there: Tensor  # int64: token at each place
    back: Tensor  # int64: place of each token; one past the last place for tokens left out
    in_place: bool  # token p is at place p and the tokens left out are the last ones: nothing to gather

    @staticmethod
    def of(there: Tensor, total: int) -> "Order":
        """The order that puts token there[p] of `total` tokens at place p."""
        places = torch.arange(len(there))
        back = torch.full((total,), len(there))
        back[there] = places
        return Order(there, back, torch.equal(there, places))

    def gather(self, x_TNH: Tensor) -> Tensor:
        """The tokens in this order, at least in fp32, in which attention is computed."""
        x_TNH = x_TNH[: len(self.there)].contiguous() if self.in_place else x_TNH.index_select(0, self.there)
        return x_TNH.to(torch.promote_types(x_TNH.dtype, torch.float32))

    def spread(self, parts: Iterable[Tensor], like: Tensor) -> Tensor:
        """Inverse of `gather`, from consecutive parts of an ordered tensor like `like`; zeros for tokens left out."""
        left_out = len(self.back) - len(self.there) if self.in_place else 1
        parts = [*parts]
        if left_out or not parts:
            parts.append(like.new_zeros(left_out, *like.shape[1:]))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if self.in_place else whole.index_select(0, self.back)


@dataclass(frozen=True, eq=False)
class HostTile:
    """One call: the next `rows` queries on slices of the ordered keys, with a bias of 0 or -inf (`tiling.Tile`)."""

    rows: int
    batch: int
    keys: tuple[slice, ...]
    common: int
    bias_ts: Tensor | None

    def heads_first(self, x_tNH: Tensor) -> Tensor:
        """[B t, N, H] -> [B, N, t, H], the layout of torch's attention calls; a view."""
        return x_tNH.unflatten(0, (self.batch, len(x_tNH) // self.batch)).transpose(1, 2)

    def pick(self, x_KMH: Tensor) -> Tensor:
        """[B, M, s, H]: the tile's part of ordered keys or values; a view if it is one slice."""
        parts = [x_KMH[part] for part in self.keys]
        return self.heads_first(parts[0] if len(parts) == 1 else torch.cat(parts))

    def add(self, x_BMsH: Tensor, into_KMH: Tensor) -> None:
        """Add gradients of the tile's keys to those of all ordered keys."""
        sizes = [part.stop - part.start for part in self.keys]
        for part, piece in zip(self.keys, _tokens_first(x_BMsH).split(sizes), strict=True):
            into_KMH[part].add_(piece)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """The additive mask [t, s] of the flash call; None if all pairs are visible."""
        if self.bias_ts is None:
            return None
        if self.common == 0:
            return self.bias_ts.to(dtype)
        mask_ts = torch.zeros(self.rows, self.common + self.bias_ts.shape[1], dtype=dtype)
        mask_ts[:, self.common :] = self.bias_ts
        return mask_ts


@dataclass(frozen=True, eq=False)
class HostPlan:
    """Made once per batch by `plan_host`; serves every layer and any number of heads, forward and backward."""

    queries: Order
    keys: Order
    tiles: tuple[HostTile, ...]
    rows: tuple[int, ...]  # queries of each tile

    @cached_property
    def whole(self) -> bool:
        """Whether all queries see all keys and both are in order: a single call on the inputs as they are."""
        orders = (self.queries, self.keys)
        if len(self.tiles) != 1 or not all(o.in_place and len(o.there) == len(o.back) for o in orders):
            return False
        (tile,) = self.tiles
        return tile.batch == 1 and tile.bias_ts is None and tile.keys == (slice(0, len(self.keys.there)),)


def plan_host(ranges: AttentionRanges) -> HostPlan:
    """Plan the calls for a mask. Raises ValueError for a mask that `mask.check` refuses."""
    if _sees_all(ranges):  # one image, one decoded token: planning costs no more than a layer's attention
        keys, queries = np.argsort(ranges.key_code, kind="stable"), ranges.queries
        single = HostTile(queries, 1, (slice(0, len(keys)),), 0, None)
        orders = Order.of(torch.arange(queries), queries), Order.of(torch.from_numpy(keys), len(keys))
        return HostPlan(*orders, (single,), (queries,))
    check(ranges)
    tiling = cut_into_tiles(ranges)
    tiles = []
    for tile in tiling.tiles:
        bias_ts = None
        if tile.hidden_ts is not None:
            bias_ts = torch.zeros(tile.hidden_ts.shape).masked_fill_(torch.from_numpy(tile.hidden_ts), -math.inf)
        tiles.append(HostTile(tile.stop - tile.start, tile.batch, tile.keys, tile.common, bias_ts))
    return HostPlan(
        Order.of(torch.from_numpy(tiling.rows), ranges.queries),
        Order.of(torch.from_numpy(tiling.keys), ranges.keys),
        tuple(tiles),
        tuple(tile.rows for tile in tiles),
    )


def _sees_all(ranges: AttentionRanges) -> bool:
    """Whether the public range of every query holds the codes of all keys."""
    if ranges.queries == 0 or ranges.keys == 0:
        return False
    first, last = ranges.key_code.min(), ranges.key_code.max()
    return bool(first >= 0 and ranges.public_start.max() <= first and ranges.public_stop.min() > last)


def host_attention(q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: HostPlan, scale: float | None = None) -> Tensor:
    """Attention under the plan's mask, computed in fp32 (fp64 for fp64). The same inputs give the same bits.

    Args:
        q_TNH: [T, N, H] queries on the CPU.
        k_KMH: [K, M, H] keys; M divides N.
        v_KMH: [K, M, H] values.
        plan: of a mask with T queries and K keys.
        scale: of the scores; default 1 / sqrt(H).

    Returns:
        [T, N, H] in the dtype of the inputs, 0 for queries that see nothing.

    Raises:
        ValueError: shapes or dtypes do not fit each other or the plan.
    """
    if torch.is_grad_enabled():
        return host_attention_lse(q_TNH, k_KMH, v_KMH, plan, scale)[0]
    _check(q_TNH, k_KMH, v_KMH, plan)
    if plan.whole and q_TNH.dtype in (torch.float32, torch.float64):
        # A decoded token: ordering, splitting and joining would take longer than the attention.
        out, _ = _flash(*(x.transpose(0, 1)[None] for x in (q_TNH, k_KMH, v_KMH)), scale=scale)
        return _tokens_first(out)
    q, _, _, outs, _ = _run_tiles(q_TNH, k_KMH, v_KMH, plan, q_TNH.shape[2] ** -0.5 if scale is None else scale)
    return plan.queries.spread(map(_tokens_first, outs), q).to(q_TNH.dtype)


def host_attention_lse(
    q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: HostPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`host_attention`, and the natural-log sum of exponentials [N, T], without gradient: -inf if nothing is seen."""
    _check(q_TNH, k_KMH, v_KMH, plan)
    return _HostAttention.apply(q_TNH, k_KMH, v_KMH, plan, q_TNH.shape[2] ** -0.5 if scale is None else scale)


def _check(q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: HostPlan) -> None:
    for name, x, order in (("q", q_TNH, plan.queries), ("k", k_KMH, plan.keys), ("v", v_KMH, plan.keys)):
        if x.dim() != 3 or len(x) != len(order.back):
            raise ValueError(f"{name}: the plan is for [{len(order.back)}, heads, head dim], found {[*x.shape]}")
        if x.shape[2] != q_TNH.shape[2] or x.dtype != q_TNH.dtype:
            found = f"{q_TNH.dtype} {[*q_TNH.shape]} and {x.dtype} {[*x.shape]}"
            raise ValueError(f"q and {name}: expected one dtype and head dim, found {found}")
    heads, kv_heads = q_TNH.shape[1], k_KMH.shape[1]
    if heads % kv_heads or v_KMH.shape[1] != kv_heads:
        found = f"{heads} query heads, {kv_heads} key heads, {v_KMH.shape[1]} value heads"
        raise ValueError(f"{found}: expected as many value as key heads, and a divisor of the query heads")


def _run_tiles(
    q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: HostPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Ordered (q, k, v), and the outputs [B, N, t, H] and logsumexps of every tile."""
    q, k, v = plan.queries.gather(q_TNH), plan.keys.gather(k_KMH), plan.keys.gather(v_KMH)
    outs, lses = [], []
    for tile, q_tNH in zip(plan.tiles, q.split(plan.rows), strict=True):
        qkv = tile.heads_first(q_tNH), tile.pick(k), tile.pick(v)
        out, lse = _flash(*qkv, attn_mask=tile.mask(q.dtype), scale=scale)
        outs.append(out)
        lses.append(lse)
    return q, k, v, outs, lses


class _HostAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, plan: HostPlan, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v, outs, lses = _run_tiles(q_TNH, k_KMH, v_KMH, plan, scale)
        ctx.save_for_backward(q, k, v, *outs, *lses)
        ctx.plan, ctx.scale, ctx.dtype = plan, scale, q_TNH.dtype
        blind_N1 = q.new_full((q.shape[1], 1), -math.inf)
        lse_NT = torch.cat([*(lse.transpose(0, 1).flatten(1) for lse in lses), blind_N1], 1)
        lse_NT = lse_NT.index_select(1, plan.queries.back)
        ctx.mark_non_differentiable(lse_NT)
        return plan.queries.spread(map(_tokens_first, outs), q).to(q_TNH.dtype), lse_NT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        plan, (q, k, v, *saved) = ctx.plan, ctx.saved_tensors
        outs, lses = saved[: len(plan.tiles)], saved[len(plan.tiles) :]
        grad = plan.queries.gather(grad_TNH)
        dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        calls = zip(plan.tiles, grad.split(plan.rows), q.split(plan.rows), outs, lses, strict=True)
        for tile, grad_tNH, q_tNH, out, lse in calls:
            inputs = tile.heads_first(grad_tNH), tile.heads_first(q_tNH), tile.pick(k), tile.pick(v), out, lse
            mask = tile.mask(q.dtype)
            dq_tile, dk_tile, dv_tile = _flash_backward(*inputs, 0.0, False, attn_mask=mask, scale=ctx.scale)
            dqs.append(_tokens_first(dq_tile))
            tile.add(dk_tile, dk)
            tile.add(dv_tile, dv)
        grads = plan.queries.spread(dqs, q), plan.keys.spread([dk], k), plan.keys.spread([dv], v)
        return *(x.to(ctx.dtype) for x in grads), None, None


def _tokens_first(x_BNtH: Tensor) -> Tensor:
    """[B, N, t, H] -> [B t, N, H], the inverse of `HostTile.heads_first`."""
    return x_BNtH.transpose(1, 2).flatten(0, 1)

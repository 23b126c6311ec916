"""The CPU engine: exact attention as a few dozen flash-attention calls per pack, one per tile of the mask.

The plan is made once per batch. Each layer then gathers queries, keys and values into the plan's order once
(unless they lie in it), calls torch's CPU flash kernel on slices of them (grouped queries share K and V inside it), and
gathers the outputs back. Backward loops over the same tiles and adds the gradients of keys and values into their
slices: autograd through slices would fill a whole-size tensor for each.

Letters: T queries, S keys, N query heads, M key/value heads, H head dim, R rows and K keys of a tile, B its batch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabagel_kernels.attention.mask import AttentionCodes, check
from megabagel_kernels.attention.tiling import cut_into_tiles

# What scaled_dot_product_attention calls on a CPU; called directly because only here is the logsumexp to be had.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, eq=False)
class Order:
    """Some tokens of a pack in the plan's order, and the way back."""

    there: Tensor  # int64: token of each place
    back: Tensor  # int64: place of each token; one past the last place for tokens left out
    in_place: bool  # token p is at place p, and those left out are the last ones

    @staticmethod
    def of(there: Tensor, total: int) -> "Order":
        """The order that puts token there[p] of `total` tokens at place p."""
        places = torch.arange(len(there))
        back = torch.full((total,), len(there))
        back[there] = places
        return Order(there, back, torch.equal(there, places))

    def gather(self, x_TNH: Tensor) -> Tensor:
        """The tokens in this order, in the dtype of the arithmetic."""
        x_TNH = x_TNH[: len(self.there)].contiguous() if self.in_place else x_TNH.index_select(0, self.there)
        return x_TNH.to(torch.promote_types(x_TNH.dtype, torch.float32))

    def spread(self, parts: Iterable[Tensor], like: Tensor) -> Tensor:
        """The way back from consecutive parts of an ordered tensor such as `like`; zeros for tokens left out."""
        left_out = len(self.back) - len(self.there) if self.in_place else 1
        whole = torch.cat([*parts, like.new_zeros(left_out, *like.shape[1:])])
        return whole if self.in_place else whole.index_select(0, self.back)


@dataclass(frozen=True, eq=False)
class HostTile:
    """One call: the next `rows` queries on slices of the ordered keys, with a bias of 0 or -inf (see `tiling.Tile`)."""

    rows: int
    batch: int
    keys: tuple[slice, ...]
    common: int
    bias_RK: Tensor | None

    def heads_first(self, x_RNH: Tensor) -> Tensor:
        """[B R, N, H] -> [B, N, R, H], the layout of torch's attention calls; a view."""
        return x_RNH.unflatten(0, (self.batch, len(x_RNH) // self.batch)).transpose(1, 2)

    def pick(self, x_SMH: Tensor) -> Tensor:
        """[B, M, K, H]: the tile's part of ordered keys or values; a view if it is one slice."""
        parts = [x_SMH[part] for part in self.keys]
        return self.heads_first(parts[0] if len(parts) == 1 else torch.cat(parts))

    def add(self, x_BMKH: Tensor, into_SMH: Tensor) -> None:
        """Add gradients of the tile's keys to those of all ordered keys."""
        sizes = [part.stop - part.start for part in self.keys]
        for part, piece in zip(self.keys, _tokens_first(x_BMKH).split(sizes), strict=True):
            into_SMH[part].add_(piece)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """The additive mask [R, K] that the flash call takes."""
        if self.bias_RK is None:
            return None
        if self.common == 0:
            return self.bias_RK.to(dtype)
        mask_RK = torch.zeros(self.rows, self.common + self.bias_RK.shape[1], dtype=dtype)
        mask_RK[:, self.common :] = self.bias_RK
        return mask_RK


@dataclass(frozen=True, eq=False)
class HostPlan:
    """Made once per batch by `plan_host`; serves every layer and any number of heads, forward and backward."""

    queries: Order
    keys: Order
    tiles: tuple[HostTile, ...]
    rows: tuple[int, ...]  # queries of each tile


def plan_host(codes: AttentionCodes) -> HostPlan:
    """Plan the calls for a mask. Raises ValueError on codes that `mask.check` refuses."""
    check(codes)
    tiling = cut_into_tiles(codes)
    tiles = []
    for tile in tiling.tiles:
        bias_RK = None
        if tile.hidden_RK is not None:
            bias_RK = torch.zeros(tile.hidden_RK.shape).masked_fill_(torch.from_numpy(tile.hidden_RK), -math.inf)
        tiles.append(HostTile(tile.stop - tile.start, tile.batch, tile.keys, tile.common, bias_RK))
    return HostPlan(
        Order.of(torch.from_numpy(tiling.rows), codes.queries),
        Order.of(torch.from_numpy(tiling.keys), codes.keys),
        tuple(tiles),
        tuple(tile.rows for tile in tiles),
    )


def host_attention(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, plan: HostPlan, scale: float | None = None) -> Tensor:
    """Attention under the plan's mask, [T, N, H] in the dtype of the inputs; 0 for queries that see nothing.

    Computes in fp32 (fp64 for fp64 inputs). `scale` defaults to 1 / sqrt(H). The same inputs give the same bits.
    Raises ValueError if shapes or dtypes do not fit each other or the plan.
    """
    return host_attention_lse(q_TNH, k_SMH, v_SMH, plan, scale)[0]


def host_attention_lse(
    q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, plan: HostPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `host_attention`, and the natural-log sum of exponentials [N, T]: -inf if nothing is seen, no gradient."""
    _check(q_TNH, k_SMH, v_SMH, plan)
    return _HostAttention.apply(q_TNH, k_SMH, v_SMH, plan, q_TNH.shape[2] ** -0.5 if scale is None else scale)


def _check(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, plan: HostPlan) -> None:
    for name, x, order in (("q", q_TNH, plan.queries), ("k", k_SMH, plan.keys), ("v", v_SMH, plan.keys)):
        if x.dim() != 3 or len(x) != len(order.back):
            raise ValueError(f"{name}: the plan is for [{len(order.back)}, heads, head dim], found {[*x.shape]}")
        if x.shape[2] != q_TNH.shape[2] or x.dtype != q_TNH.dtype:
            found = f"{q_TNH.dtype} {[*q_TNH.shape]} and {x.dtype} {[*x.shape]}"
            raise ValueError(f"q and {name}: expected one dtype and head dim, found {found}")
    heads, kv_heads = q_TNH.shape[1], k_SMH.shape[1]
    if heads % kv_heads or v_SMH.shape[1] != kv_heads:
        found = f"{heads} query heads, {kv_heads} key heads, {v_SMH.shape[1]} value heads"
        raise ValueError(f"{found}: expected as many value as key heads, and a divisor of the query heads")


class _HostAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, plan: HostPlan, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = plan.queries.gather(q_TNH), plan.keys.gather(k_SMH), plan.keys.gather(v_SMH)
        outs, lses = [], []
        for tile, q_RNH in zip(plan.tiles, q.split(plan.rows), strict=True):
            qkv = tile.heads_first(q_RNH), tile.pick(k), tile.pick(v)
            out, lse = _flash(*qkv, attn_mask=tile.mask(q.dtype), scale=scale)
            outs.append(out)
            lses.append(lse)
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
        for tile, grad_RNH, q_RNH, out, lse in calls:
            inputs = tile.heads_first(grad_RNH), tile.heads_first(q_RNH), tile.pick(k), tile.pick(v), out, lse
            mask = tile.mask(q.dtype)
            dq_tile, dk_tile, dv_tile = _flash_backward(*inputs, 0.0, False, attn_mask=mask, scale=ctx.scale)
            dqs.append(_tokens_first(dq_tile))
            tile.add(dk_tile, dk)
            tile.add(dv_tile, dv)
        grads = plan.queries.spread(dqs, q), plan.keys.spread([dk], k), plan.keys.spread([dv], v)
        return *(x.to(ctx.dtype) for x in grads), None, None


def _tokens_first(x_BNRH: Tensor) -> Tensor:
    """[B, N, R, H] -> [B R, N, H], the inverse of `HostTile.heads_first`."""
    return x_BNRH.transpose(1, 2).flatten(0, 1)

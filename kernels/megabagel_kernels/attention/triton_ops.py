"""Triton attention as `torch.library` operators: launches, shapes for meta tensors, gradients, FLOP counts.

`megabagel::attention` and `megabagel::attention_backward` take the tensors and integers of a `TritonPlan`, because an
operator's arguments must be tensors and numbers; `triton.py` has checked them. Triton is imported by the first launch.

Letters: T queries, K keys, N query heads, M key/value heads, H head dim.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megabagel_kernels.attention.configs import Config, Configs, tile_width
from megabagel_kernels.checks import check_launch

STATISTICS_ROWS = 64


@torch.library.custom_op("megabagel::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],
    configs: list[int],
    visible: int,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out [T, N, H] and lse [N, T]; see `triton.triton_attention_lse`."""
    from megabagel_kernels.attention import triton_forward as kernels

    check_launch(kernels.forward, q)
    out, lse = _outputs(q, out_dtype)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-math.inf)
    how = Configs.of(configs)
    config = how.forward
    ranges, code, work, blocks = plan[:4]
    with torch.cuda.device_of(q):
        kernels.forward[(len(work) * q.shape[1],)](
            *_tiles(how, config.rows, q), *_tiles(how, config.cols, k, v), *_tiles(how, config.rows, out),
            lse, work, blocks, ranges, code,
            len(q), len(k), ranges.shape[1], q.shape[1], *_row_strides(q, k, v, out),
            scale * math.log2(math.e),
            **_constants(q, k, config, how),
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("megabagel::attention_backward", mutates_args=())
def attention_backward_op(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: list[Tensor],
    configs: list[int],
    visible: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the gradients of out and lse (None for zero).

    With out and lse over *all* keys of a query and a plan for some of these keys, the results are that part of dq, and
    dk and dv of these keys: context parallelism that passes keys around sums them.
    """
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad = grad.to(q.dtype).contiguous()
    with torch.cuda.device_of(q):
        statistics = _statistics(grad, grad_lse, out, lse, plan[0].shape[1])
        dq = _launch_dq(q, k, v, grad, statistics, plan, Configs.of(configs), scale)
        dk, dv = _launch_dkv(q, k, v, grad, statistics, plan, Configs.of(configs), scale)
    return dq, dk, dv


def _statistics(grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, padded: int) -> Tensor:
    """fp32 [2 N, T_pad]: per head the lse in base 2, then per head delta."""
    from megabagel_kernels.attention import triton_forward as kernels

    queries, heads, head_dim = out.shape
    statistics = torch.empty(2 * heads, padded, dtype=torch.float32, device=out.device)
    kernels.statistics[(padded // STATISTICS_ROWS, heads)](
        out, grad, lse, lse if grad_lse is None else grad_lse.contiguous(), statistics, queries, padded, heads,
        HAS_GRAD_LSE=grad_lse is not None, H=head_dim, HP=tile_width(head_dim), ROWS=STATISTICS_ROWS, num_warps=4,
    )  # fmt: skip
    return statistics


def _launch_dq(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, statistics: Tensor, plan: list[Tensor], how: Configs, scale: float
) -> Tensor:
    from megabagel_kernels.attention import triton_backward as kernels

    config = how.dq
    ranges, code, _, _, work, blocks = plan[:6]
    dq = _like(q)
    kernels.backward_dq[(len(work) * q.shape[1],)](
        *_tiles(how, config.rows, q), *_tiles(how, config.cols, k, v), *_tiles(how, config.rows, grad, dq),
        statistics, work, blocks, ranges, code,
        len(q), len(k), ranges.shape[1], q.shape[1], *_row_strides(q, k, v, grad),
        scale * math.log2(math.e), scale,
        **_constants(q, k, config, how),
    )  # fmt: skip
    return dq


def _launch_dkv(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, statistics: Tensor, plan: list[Tensor], how: Configs, scale: float
) -> tuple[Tensor, Tensor]:
    from megabagel_kernels.attention import triton_backward as kernels

    config = how.dkv
    ranges, code, *_, work, blocks = plan
    (heads, head_dim), kv_heads = q.shape[1:], k.shape[1]
    split = len(work) * kv_heads < how.split_below and heads > kv_heads
    parts = heads if split else kv_heads
    part_dtype = torch.float32 if split else k.dtype
    dk, dv = (torch.empty(len(k), parts, head_dim, dtype=part_dtype, device=k.device) for _ in range(2))
    stats = _descriptor(statistics, [1, config.rows]) if how.descriptors else statistics
    kernels.backward_dkv[(len(work) * parts,)](
        *_tiles(how, config.rows, q), *_tiles(how, config.cols, k, v),
        *_tiles(how, config.rows, grad), *_tiles(how, config.cols, dk, dv),
        stats, work, blocks, ranges, code,
        len(q), len(k), ranges.shape[1], heads, *_row_strides(q, k, v, grad, dk),
        scale * math.log2(math.e), scale,
        HEADS=heads // parts, **_constants(q, k, config, how),
    )  # fmt: skip
    if split:
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2).to(k.dtype) for x in (dk, dv))
    return dk, dv


def _outputs(q: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    queries, heads, _ = q.shape
    lse = torch.empty(heads, queries, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=out_dtype, device=q.device), lse


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _constants(q: Tensor, k: Tensor, config: Config, how: Configs) -> dict[str, Any]:
    """Compile-time arguments of all kernels. enable_fp_fusion is named because its default has changed."""
    head_dim = q.shape[2]
    return {
        "GROUP": q.shape[1] // k.shape[1], "H": head_dim, "HP": tile_width(head_dim),
        "ROWS": config.rows, "COLS": config.cols, "DESCRIPTOR": how.descriptors,
        "num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _row_strides(*tensors: Tensor) -> list[int]:
    """Row strides; for a single row torch may report any number, so that of a contiguous tensor is taken."""
    return [x.stride(0) if len(x) > 1 else x.shape[1] * x.shape[2] for x in tensors]


def _tiles(how: Configs, rows: int, *tensors: Tensor) -> list[Any]:
    """Tensors [tokens, heads, H] as `triton_forward.load_tile` takes them: pointers, or descriptors of tiles."""
    if not how.descriptors:
        return [*tensors]
    descriptors = []
    for x, stride in zip(tensors, _row_strides(*tensors), strict=True):
        tokens, heads, head_dim = x.shape
        matrix = x.as_strided((tokens, heads * head_dim), (stride, 1))
        descriptors.append(_descriptor(matrix, [rows, head_dim]))
    return descriptors


def _descriptor(x: Tensor, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, plan: Any, configs: Any, visible: int, scale: float, out_dtype: Any) -> Any:
    return _outputs(q, out_dtype)


@attention_backward_op.register_fake
def _(grad: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, plan, ctx.configs, ctx.visible, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output, *plan)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *plan = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    found = attention_backward_op(grad, grad_lse, q, k, v, out, lse, plan, ctx.configs, ctx.visible, ctx.scale)
    return *found, [None] * len(plan), None, None, None, None


attention_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.megabagel.attention)
def _forward_flops(q: Any, k: Any, v: Any, plan: Any, configs: Any, visible: int, *rest: Any, **kwargs: Any) -> int:
    """Two matrix products over the visible pairs."""
    return 4 * visible * q[1] * q[2]


@register_flop_formula(torch.ops.megabagel.attention_backward)
def _backward_flops(
    grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, plan: Any, configs: Any, visible: int,
    *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Five matrix products over the visible pairs; the two that the kernels compute again do not count."""
    return 10 * visible * q[1] * q[2]

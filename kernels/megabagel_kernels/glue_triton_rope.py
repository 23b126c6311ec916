"""RMS norm of query or key heads and rotary embedding in one Triton pass each way. Reference: `reference.qk_norm_rope`.

Rows may be slices of one fused projection: they may have any stride, heads lie dense. Backward reads the same slices
and makes the scales again, so nothing is kept but views.

Letters: T rows [und | gen], N heads, H channels of a head, R = H / 2 rotary frequencies, RP the next power of two;
P programs, ROWS rows of each.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.door import INTEGERS, check_device, check_dtype, check_launch, check_layout, check_shape
from megabagel_kernels.glue_triton import check_rows, load_gamma, owned_rows, programs, rounded, sum_parts

ROWS, WARPS = 16, 4


@triton.jit
def _load_halves(X, offset, inside, R: tl.constexpr):
    """Both halves of a head as fp32: channel i and its partner i + R."""
    first = tl.load(X + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(X + offset + R, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(X, offset, first, second, inside, R: tl.constexpr):
    tl.store(X + offset, first.to(X.dtype.element_ty), mask=inside)
    tl.store(X + offset + R, second.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _load_rows(
    UND, GEN, POSITION, COS, SIN, border, T, table_stride, R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr
):
    """What all heads of a program's rows share: rows, channels, mask, both halves of gamma, cosines and sines."""
    start, stop, of_gen = owned_rows(tl.program_id(0), border, T, ROWS)
    rows = start + tl.arange(0, ROWS)
    channels = tl.arange(0, RP)
    known = channels < R
    inside = (rows < stop)[:, None] & known[None, :]
    gamma_first = load_gamma(UND, GEN, of_gen, channels, known)[None, :]
    gamma_second = load_gamma(UND + R, GEN + R, of_gen, channels, known)[None, :]
    position = tl.load(POSITION + rows, mask=rows < stop, other=0).to(tl.int32)
    entry = position[:, None] * table_stride + channels[None, :]
    cos = tl.load(COS + entry, mask=inside, other=0.0)
    sin = tl.load(SIN + entry, mask=inside, other=0.0)
    return rows[:, None], channels[None, :], inside, gamma_first, gamma_second, cos, sin


@triton.jit(do_not_specialize=["border", "T"])
def rope_forward(
    X, UND, GEN, POSITION, COS, SIN, Y, border, T, x_stride, table_stride, eps,
    N: tl.constexpr, H: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y [T, N, H] of a program's rows."""
    R: tl.constexpr = H // 2
    rows, channels, inside, gamma_first, gamma_second, cos, sin = _load_rows(
        UND, GEN, POSITION, COS, SIN, border, T, table_stride, R, RP, ROWS
    )
    for head in range(N):
        first, second = _load_halves(X, rows * x_stride + head * H + channels, inside, R)
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.math.rsqrt(square / H + eps)[:, None]
        first = rounded(rounded(first * scale, Y) * gamma_first, Y)
        second = rounded(rounded(second * scale, Y) * gamma_second, Y)
        to = (rows * N + head) * H + channels
        _store_halves(Y, to, first * cos - second * sin, second * cos + first * sin, inside, R)


@triton.jit(do_not_specialize=["border", "T"])
def rope_backward(
    X, UND, GEN, POSITION, COS, SIN, DY, DX, DGAMMA, border, T, x_stride, table_stride, eps,
    N: tl.constexpr, H: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DX [T, N, H] of a program's rows, and their sum DGAMMA [P, H]; formulas as in `glue_triton_norm`."""
    R: tl.constexpr = H // 2
    rows, channels, inside, gamma_first, gamma_second, cos, sin = _load_rows(
        UND, GEN, POSITION, COS, SIN, border, T, table_stride, R, RP, ROWS
    )
    dgamma_first = tl.zeros((ROWS, RP), tl.float32)
    dgamma_second = tl.zeros((ROWS, RP), tl.float32)
    for head in range(N):
        first, second = _load_halves(X, rows * x_stride + head * H + channels, inside, R)
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.math.rsqrt(square / H + eps)[:, None]
        first *= scale
        second *= scale
        to = (rows * N + head) * H + channels
        dy_first, dy_second = _load_halves(DY, to, inside, R)
        d_first = dy_first * cos + dy_second * sin  # turned back
        d_second = dy_second * cos - dy_first * sin
        dgamma_first += d_first * first
        dgamma_second += d_second * second
        d_first *= gamma_first
        d_second *= gamma_second
        mean = ((tl.sum(d_first * first, 1) + tl.sum(d_second * second, 1)) / H)[:, None]
        _store_halves(DX, to, scale * (d_first - first * mean), scale * (d_second - second * mean), inside, R)
    sums = DGAMMA + tl.program_id(0) * H + tl.arange(0, RP)
    known = tl.arange(0, RP) < R
    tl.store(sums, tl.sum(dgamma_first, 0), mask=known)
    tl.store(sums + R, tl.sum(dgamma_second, 0), mask=known)


def qk_norm_rope(
    x_TNH: Tensor, und_H: Tensor, gen_H: Tensor, border: int,
    position_T: Tensor, cos_PR: Tensor, sin_PR: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """`reference.qk_norm_rope` in one pass each way -> dense [T, N, H].

    Positions must be rows of the tables, which is not checked: it would have to wait for the device. Raises ValueError
    where shapes, types, devices or strides do not fit.
    """
    if x_TNH.ndim != 3 or x_TNH.shape[2] % 2:
        raise ValueError(f"x_TNH has shape {tuple(x_TNH.shape)}, expected [rows, heads, an even number of channels]")
    check_rows(x_TNH, und_H, gen_H, border, "x_TNH", inner=2)
    check_dtype("position_T", position_T, *INTEGERS)
    check_shape("position_T", position_T, x_TNH.shape[:1])
    check_layout("position_T", position_T)
    for name, x in (("cos_PR", cos_PR), ("sin_PR", sin_PR)):
        check_shape(name, x, (cos_PR.shape[0], x_TNH.shape[2] // 2))
        check_dtype(name, x, torch.float32)
        check_layout(name, x)
    if cos_PR.stride(0) != sin_PR.stride(0):
        raise ValueError(f"cos_PR has row stride {cos_PR.stride(0)}, sin_PR {sin_PR.stride(0)}, expected the same")
    check_device(x_TNH, position_T=position_T, cos_PR=cos_PR, sin_PR=sin_PR)
    return _qk_norm_rope(x_TNH, und_H, gen_H, border, position_T, cos_PR, sin_PR, eps)


@torch.library.custom_op("megabagel::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    x_TNH: Tensor, und_H: Tensor, gen_H: Tensor, border: int,
    position_T: Tensor, cos_PR: Tensor, sin_PR: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    check_launch(rope_forward, x_TNH)
    rows, heads, width = x_TNH.shape
    y_TNH = x_TNH.new_empty(rows, heads, width)
    if rows:
        rope_forward[(programs(border, rows, ROWS)[1],)](
            x_TNH, und_H, gen_H, position_T, cos_PR, sin_PR, y_TNH, border, rows, x_TNH.stride(0),
            cos_PR.stride(0), eps,
            N=heads, H=width, RP=triton.next_power_of_2(width // 2), ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return y_TNH


@_qk_norm_rope.register_fake
def _(x_TNH: Tensor, *_: Any) -> Tensor:
    return x_TNH.new_empty(x_TNH.shape)


@torch.library.custom_op("megabagel::qk_norm_rope_backward", mutates_args=())
def _backward(
    dy_TNH: Tensor, x_TNH: Tensor, und_H: Tensor, gen_H: Tensor, border: int,
    position_T: Tensor, cos_PR: Tensor, sin_PR: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [T, N, H], dgamma of und, of gen); dy lies dense."""
    rows, heads, width = x_TNH.shape
    und_programs, all_programs = programs(border, rows, ROWS)
    dx_TNH = x_TNH.new_empty(rows, heads, width)
    dgamma_PH = x_TNH.new_empty(all_programs, width, dtype=torch.float32)
    if rows:
        rope_backward[(all_programs,)](
            x_TNH, und_H, gen_H, position_T, cos_PR, sin_PR, dy_TNH, dx_TNH, dgamma_PH, border, rows, x_TNH.stride(0),
            cos_PR.stride(0), eps,
            N=heads, H=width, RP=triton.next_power_of_2(width // 2), ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return dx_TNH, *sum_parts(dgamma_PH, und_programs, und_H)


@_backward.register_fake
def _(dy_TNH: Tensor, x_TNH: Tensor, und_H: Tensor, gen_H: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x_TNH.new_empty(x_TNH.shape), torch.empty_like(und_H), torch.empty_like(gen_H)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TNH, und_H, gen_H, ctx.border, position_T, cos_PR, sin_PR, ctx.eps = inputs
    ctx.save_for_backward(x_TNH, und_H, gen_H, position_T, cos_PR, sin_PR)


def _qk_norm_rope_backward(ctx: Any, dy_TNH: Tensor) -> tuple[Tensor | None, ...]:
    x_TNH, und_H, gen_H, *tables = ctx.saved_tensors
    dx_TNH, dund_H, dgen_H = _backward(dy_TNH.contiguous(), x_TNH, und_H, gen_H, ctx.border, *tables, ctx.eps)
    return dx_TNH, dund_H, dgen_H, None, None, None, None, None


_qk_norm_rope.register_autograd(_qk_norm_rope_backward, setup_context=_keep_inputs)

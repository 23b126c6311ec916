"""QK-norm + RoPE in one Triton pass each way.

Each expert's rows are one launch with one gamma; both launches write into the same [und | gen] result. (One launch for
both experts needs programs that pick their gamma and their input; it would save one kernel launch, and was dropped for
the simpler kernel.) Backward reads the same slices of the projections and computes the scales again, so
nothing is saved but views.

Gradients of gamma are summed per program and added by torch afterwards: no atomics, so equal inputs give equal bits.

Letters: U und rows, G gen rows, T rows of one launch; N heads, H head dim, R = H / 2 rotary frequencies, RP the next
power of two.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.checks import check_launch
from megabagel_kernels.rounding import round_like

ROWS, WARPS = 16, 4


@triton.jit
def _load_halves(X, offset, inside, R: tl.constexpr):
    """Both halves of a head as fp32: channels i and their partners i + R."""
    first = tl.load(X + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(X + offset + R, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(X, offset, first, second, inside, R: tl.constexpr):
    tl.store(X + offset, first.to(X.dtype.element_ty), mask=inside)
    tl.store(X + offset + R, second.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _load_shared(GAMMA, COS, SIN, T, table_stride, R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr):
    """Values that all heads of a program's rows share: row and channel numbers, mask, gamma halves, cosines, sines."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, RP)
    known = channels < R
    inside = (rows < T)[:, None] & known[None, :]
    gamma_first = tl.load(GAMMA + channels, mask=known, other=0.0).to(tl.float32)[None, :]
    gamma_second = tl.load(GAMMA + R + channels, mask=known, other=0.0).to(tl.float32)[None, :]
    entry = rows[:, None] * table_stride + channels[None, :]  # the second half of a table's row equals the first
    cos = tl.load(COS + entry, mask=inside, other=0.0)
    sin = tl.load(SIN + entry, mask=inside, other=0.0)
    return rows[:, None], channels[None, :], inside, gamma_first, gamma_second, cos, sin


@triton.jit(do_not_specialize=["T"])
def rope_forward(
    X, GAMMA, COS, SIN, Y, T, x_stride, table_stride, eps,
    N: tl.constexpr, H: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y [T, N, H] of a program's rows."""
    R: tl.constexpr = H // 2
    rows, channels, inside, gamma_first, gamma_second, cos, sin = _load_shared(
        GAMMA, COS, SIN, T, table_stride, R, RP, ROWS
    )
    for head in range(N):
        first, second = _load_halves(X, rows * x_stride + head * H + channels, inside, R)
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.math.rsqrt(square / H + eps)[:, None]
        first = round_like(round_like(first * scale, Y) * gamma_first, Y)
        second = round_like(round_like(second * scale, Y) * gamma_second, Y)
        to = (rows * N + head) * H + channels
        _store_halves(Y, to, first * cos - second * sin, second * cos + first * sin, inside, R)


@triton.jit(do_not_specialize=["T"])
def rope_backward(
    X, GAMMA, COS, SIN, DY, DX, DGAMMA, T, x_stride, table_stride, eps,
    N: tl.constexpr, H: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DX [T, N, H] of a program's rows, and DGAMMA [programs, H]; formulas as in `rms_norm.triton.norm_backward`."""
    R: tl.constexpr = H // 2
    rows, channels, inside, gamma_first, gamma_second, cos, sin = _load_shared(
        GAMMA, COS, SIN, T, table_stride, R, RP, ROWS
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
        d_first = dy_first * cos + dy_second * sin  # rotation by the opposite angle
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
    und_UNH: Tensor, gen_GNH: Tensor, gamma_und_H: Tensor, gamma_gen_H: Tensor,
    cos_TH: Tensor, sin_TH: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """See `functional.qk_norm_rope`, which has checked the arguments."""
    return _qk_norm_rope(und_UNH, gen_GNH, gamma_und_H, gamma_gen_H, cos_TH, sin_TH, eps)


@torch.library.custom_op("megabagel::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    und_UNH: Tensor, gen_GNH: Tensor, gamma_und_H: Tensor, gamma_gen_H: Tensor,
    cos_TH: Tensor, sin_TH: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    y_TNH = _empty_result(und_UNH, gen_GNH)
    num_und = len(und_UNH)
    _launch_forward(und_UNH, gamma_und_H, cos_TH[:num_und], sin_TH[:num_und], y_TNH[:num_und], eps)
    _launch_forward(gen_GNH, gamma_gen_H, cos_TH[num_und:], sin_TH[num_und:], y_TNH[num_und:], eps)
    return y_TNH


def _empty_result(und_UNH: Tensor, gen_GNH: Tensor) -> Tensor:
    return und_UNH.new_empty(und_UNH.shape[0] + gen_GNH.shape[0], *und_UNH.shape[1:])


@_qk_norm_rope.register_fake
def _(und_UNH: Tensor, gen_GNH: Tensor, *_: Any) -> Tensor:
    return _empty_result(und_UNH, gen_GNH)


def _launch_forward(x_TNH: Tensor, gamma_H: Tensor, cos_TH: Tensor, sin_TH: Tensor, y_TNH: Tensor, eps: float) -> None:
    """One expert's rows; `y_TNH` is its slice of the result."""
    check_launch(rope_forward, x_TNH)
    rows, heads, width = x_TNH.shape
    if rows:
        rope_forward[(triton.cdiv(rows, ROWS),)](
            x_TNH, gamma_H, cos_TH, sin_TH, y_TNH, rows, x_TNH.stride(0), cos_TH.stride(0), eps,
            N=heads, H=width, RP=triton.next_power_of_2(width // 2), ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip


@torch.library.custom_op("megabagel::qk_norm_rope_backward", mutates_args=())
def _backward(
    dy_TNH: Tensor, und_UNH: Tensor, gen_GNH: Tensor, gamma_und_H: Tensor, gamma_gen_H: Tensor,
    cos_TH: Tensor, sin_TH: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dund [U, N, H], dgen [G, N, H], dgamma of und [H], of gen [H]); dy is contiguous."""
    num_und = len(und_UNH)
    dund_UNH, dgamma_und_H = _launch_backward(
        und_UNH, gamma_und_H, cos_TH[:num_und], sin_TH[:num_und], dy_TNH[:num_und], eps
    )
    dgen_GNH, dgamma_gen_H = _launch_backward(
        gen_GNH, gamma_gen_H, cos_TH[num_und:], sin_TH[num_und:], dy_TNH[num_und:], eps
    )
    return dund_UNH, dgen_GNH, dgamma_und_H, dgamma_gen_H


@_backward.register_fake
def _(
    dy_TNH: Tensor, und_UNH: Tensor, gen_GNH: Tensor, gamma_und_H: Tensor, gamma_gen_H: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dund_UNH, dgen_GNH = und_UNH.new_empty(und_UNH.shape), gen_GNH.new_empty(gen_GNH.shape)
    return dund_UNH, dgen_GNH, torch.empty_like(gamma_und_H), torch.empty_like(gamma_gen_H)


def _launch_backward(
    x_TNH: Tensor, gamma_H: Tensor, cos_TH: Tensor, sin_TH: Tensor, dy_TNH: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    rows, heads, width = x_TNH.shape
    programs = triton.cdiv(rows, ROWS)
    dx_TNH = x_TNH.new_empty(rows, heads, width)
    partial_dgamma = x_TNH.new_empty(programs, width, dtype=torch.float32)
    if rows:
        rope_backward[(programs,)](
            x_TNH, gamma_H, cos_TH, sin_TH, dy_TNH, dx_TNH, partial_dgamma, rows, x_TNH.stride(0), cos_TH.stride(0),
            eps, N=heads, H=width, RP=triton.next_power_of_2(width // 2), ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return dx_TNH, partial_dgamma.sum(0).to(gamma_H.dtype)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _qk_norm_rope_backward(ctx: Any, dy_TNH: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dy_TNH.contiguous(), *ctx.saved_tensors, ctx.eps), None, None, None


_qk_norm_rope.register_autograd(_qk_norm_rope_backward, setup_context=_save_inputs)

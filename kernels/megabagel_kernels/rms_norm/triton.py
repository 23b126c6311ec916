"""Triton kernels of RMSNorm and of residual add + RMSNorm.

Forward reads its inputs once and writes the sum (with a residual) and its norm. Backward computes the scale of each row
again from the sum, which the residual stream keeps anyway, so no statistics are saved: one extra reduction over data
that is in registers costs less than a second tensor.

A backward program handles ROWS consecutive rows and writes one partial sum of gamma's gradient; the partial sums are
added by torch afterwards. No atomics, so equal inputs give equal bits.

Letters: T rows, D width, DP the next power of two.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.checks import check_launch
from megabagel_kernels.rounding import round_like

BACKWARD_ROWS, WARPS = 32, 8
"""Rows of a backward program: more make fewer partial sums of gamma's gradient, fewer make enough programs for the
GPU (1,152 at 36,864 rows)."""


@triton.jit
def norm_forward(
    X, RESIDUAL, GAMMA, SUM, NORMED, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """SUM and NORMED [T, D], one row per program; without a residual SUM is not written."""
    row = tl.program_id(0)
    columns = tl.arange(0, DP)
    inside = columns < D
    x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(RESIDUAL + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x = round_like(x, SUM)  # backward starts from the stored sum, so forward has to normalize the same numbers
        tl.store(SUM + row * D + columns, x.to(SUM.dtype.element_ty), mask=inside)
    scale = tl.math.rsqrt(tl.sum(x * x, 0) / D + eps)
    gamma = tl.load(GAMMA + columns, mask=inside, other=0.0).to(tl.float32)
    normed = round_like(x * scale, NORMED) * gamma
    tl.store(NORMED + row * D + columns, normed.to(NORMED.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def norm_backward(
    SUM, DNORMED, DSUM, GAMMA, DX, DGAMMA, T, sum_stride, eps,
    HAS_DSUM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DX [T, D], and DGAMMA [programs, D]: the gradient of gamma summed over the rows of each program.

    With n = x * scale and g = dn * gamma: dx = dsum + scale * (g - n * mean(g * n)); dgamma sums dn * n over rows.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, DP)
    inside = columns < D
    gamma = tl.load(GAMMA + columns, mask=inside, other=0.0).to(tl.float32)
    dgamma = tl.zeros((DP,), tl.float32)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, T)):
        x = tl.load(SUM + row * sum_stride + columns, mask=inside, other=0.0).to(tl.float32)
        dnormed = tl.load(DNORMED + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.math.rsqrt(tl.sum(x * x, 0) / D + eps)
        normed = x * scale
        dgamma += dnormed * normed
        dnormed *= gamma
        dx = scale * (dnormed - normed * (tl.sum(dnormed * normed, 0) / D))
        if HAS_DSUM:
            dx += tl.load(DSUM + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + row * D + columns, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DGAMMA + program * D + columns, dgamma, mask=inside)


def rms_norm(x_TD: Tensor, gamma_D: Tensor, eps: float) -> Tensor:
    """See `functional.rms_norm`, which has checked the arguments."""
    return _rms_norm(x_TD, gamma_D, eps)


def add_rms_norm(residual_TD: Tensor, x_TD: Tensor, gamma_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `functional.add_rms_norm`, which has checked the arguments."""
    return _add_rms_norm(residual_TD, x_TD, gamma_D, eps)


@torch.library.custom_op("megabagel::rms_norm", mutates_args=())
def _rms_norm(x_TD: Tensor, gamma_D: Tensor, eps: float) -> Tensor:
    normed_TD = x_TD.new_empty(x_TD.shape)
    _launch_forward(x_TD, None, gamma_D, None, normed_TD, eps)
    return normed_TD


@_rms_norm.register_fake
def _(x_TD: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


@torch.library.custom_op("megabagel::add_rms_norm", mutates_args=())
def _add_rms_norm(residual_TD: Tensor, x_TD: Tensor, gamma_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_TD, normed_TD = (x_TD.new_empty(x_TD.shape) for _ in range(2))
    _launch_forward(x_TD, residual_TD, gamma_D, sum_TD, normed_TD, eps)
    return sum_TD, normed_TD


@_add_rms_norm.register_fake
def _(residual_TD: Tensor, x_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape)


def _launch_forward(
    x_TD: Tensor, residual_TD: Tensor | None, gamma_D: Tensor, sum_TD: Tensor | None, normed_TD: Tensor, eps: float
) -> None:
    check_launch(norm_forward, x_TD)
    rows, width = x_TD.shape
    if rows:
        norm_forward[(rows,)](
            x_TD, residual_TD, gamma_D, sum_TD, normed_TD, x_TD.stride(0),
            0 if residual_TD is None else residual_TD.stride(0), eps,
            HAS_RESIDUAL=residual_TD is not None, D=width, DP=triton.next_power_of_2(width), num_warps=WARPS,
        )  # fmt: skip


@torch.library.custom_op("megabagel::rms_norm_backward", mutates_args=())
def _backward(
    dnormed_TD: Tensor, dsum_TD: Tensor | None, sum_TD: Tensor, gamma_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(dx [T, D], dgamma [D]); incoming gradients are contiguous."""
    rows, width = sum_TD.shape
    programs = triton.cdiv(rows, BACKWARD_ROWS)
    dx_TD = sum_TD.new_empty(rows, width)
    partial_dgamma = sum_TD.new_empty(programs, width, dtype=torch.float32)
    if rows:
        norm_backward[(programs,)](
            sum_TD, dnormed_TD, dsum_TD, gamma_D, dx_TD, partial_dgamma, rows, sum_TD.stride(0), eps,
            HAS_DSUM=dsum_TD is not None, D=width, DP=triton.next_power_of_2(width), ROWS=BACKWARD_ROWS,
            num_warps=WARPS,
        )  # fmt: skip
    return dx_TD, partial_dgamma.sum(0).to(gamma_D.dtype)


@_backward.register_fake
def _(dnormed_TD: Tensor, dsum_TD: Tensor | None, sum_TD: Tensor, gamma_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return sum_TD.new_empty(sum_TD.shape), torch.empty_like(gamma_D)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, gamma_D, ctx.eps = inputs
    ctx.save_for_backward(output[0], gamma_D)


def _add_rms_norm_backward(ctx: Any, dsum_TD: Tensor, dnormed_TD: Tensor) -> tuple[Tensor | None, ...]:
    sum_TD, gamma_D = ctx.saved_tensors
    dx_TD, dgamma_D = _backward(dnormed_TD.contiguous(), dsum_TD.contiguous(), sum_TD, gamma_D, ctx.eps)
    return dx_TD, dx_TD, dgamma_D, None


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, gamma_D, ctx.eps = inputs
    ctx.save_for_backward(x_TD, gamma_D)


def _rms_norm_backward(ctx: Any, dnormed_TD: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, gamma_D = ctx.saved_tensors
    return *_backward(dnormed_TD.contiguous(), None, x_TD, gamma_D, ctx.eps), None


_add_rms_norm.register_autograd(_add_rms_norm_backward, setup_context=_save_sum)
_rms_norm.register_autograd(_rms_norm_backward, setup_context=_save_input)

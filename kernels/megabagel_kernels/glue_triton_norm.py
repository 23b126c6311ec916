"""Residual add and RMS norm with the gamma of each row's expert, as Triton kernels. References: `reference.py`.

Forward reads both summands once and writes the sum and its norm. Backward makes the row's scale again from the saved
sum, so nothing else is kept.

Letters: T rows [und | gen], W width, WP the next power of two; P programs of backward, ROWS rows of each.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.door import check_device, check_dtype, check_launch, check_layout, check_shape
from megabagel_kernels.glue_triton import check_rows, load_gamma, owned_rows, programs, rounded, sum_parts

BACKWARD_ROWS, WARPS = 32, 8
"""More rows make fewer sums of gamma's gradient, fewer rows fill more of a GPU."""


@triton.jit(do_not_specialize=["border", "T"])
def norm_forward(
    X, RESIDUAL, UND, GEN, TOTAL, NORMED, border, T, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """TOTAL and NORMED [T, W] of one row; without a residual TOTAL is not written."""
    row, _, of_gen = owned_rows(tl.program_id(0), border, T, 1)
    columns = tl.arange(0, WP)
    inside = columns < W
    x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(RESIDUAL + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x = rounded(x, TOTAL)  # what backward will see
        tl.store(TOTAL + row * W + columns, x.to(TOTAL.dtype.element_ty), mask=inside)
    scale = tl.math.rsqrt(tl.sum(x * x, 0) / W + eps)
    gamma = load_gamma(UND, GEN, of_gen, columns, inside)
    normed = rounded(x * scale, NORMED) * gamma
    tl.store(NORMED + row * W + columns, normed.to(NORMED.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["border", "T"])
def norm_backward(
    TOTAL, DNORMED, DTOTAL, UND, GEN, DX, DGAMMA, border, T, total_stride, eps,
    HAS_DTOTAL: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DX [T, W] of a program's rows, and their sum DGAMMA [P, W].

    With n = x * scale: dx = dtotal + scale * (gamma * dn - n * mean(gamma * dn * n)), and dgamma sums dn * n over rows.
    """
    program = tl.program_id(0)
    start, stop, of_gen = owned_rows(program, border, T, ROWS)
    columns = tl.arange(0, WP)
    inside = columns < W
    gamma = load_gamma(UND, GEN, of_gen, columns, inside)
    dgamma = tl.zeros((WP,), tl.float32)
    for row in range(start, stop):
        x = tl.load(TOTAL + row * total_stride + columns, mask=inside, other=0.0).to(tl.float32)
        dnormed = tl.load(DNORMED + row * W + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.math.rsqrt(tl.sum(x * x, 0) / W + eps)
        normed = x * scale
        dgamma += dnormed * normed
        dnormed *= gamma
        dx = scale * (dnormed - normed * (tl.sum(dnormed * normed, 0) / W))
        if HAS_DTOTAL:
            dx += tl.load(DTOTAL + row * W + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + row * W + columns, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DGAMMA + program * W + columns, dgamma, mask=inside)


def add_rms_norm(
    x_TW: Tensor, residual_TW: Tensor, und_W: Tensor, gen_W: Tensor, border: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm` in one pass each way. Raises ValueError where arguments do not fit."""
    _check_rows(x_TW, und_W, gen_W, border)
    check_shape("residual_TW", residual_TW, x_TW.shape)
    check_dtype("residual_TW", residual_TW, x_TW.dtype)
    check_layout("residual_TW", residual_TW)
    check_device(x_TW, residual_TW=residual_TW)
    return _add_rms_norm(x_TW, residual_TW, und_W, gen_W, border, eps)


def rms_norm(x_TW: Tensor, und_W: Tensor, gen_W: Tensor, border: int, eps: float) -> Tensor:
    """`reference.rms_norm` in one pass each way. Raises ValueError where arguments do not fit."""
    _check_rows(x_TW, und_W, gen_W, border)
    return _rms_norm(x_TW, und_W, gen_W, border, eps)


def _check_rows(x_TW: Tensor, und_W: Tensor, gen_W: Tensor, border: int) -> None:
    if x_TW.ndim != 2:
        raise ValueError(f"x_TW has shape {tuple(x_TW.shape)}, expected two axes")
    check_rows(x_TW, und_W, gen_W, border, "x_TW", inner=1)


@torch.library.custom_op("megabagel::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x_TW: Tensor, residual_TW: Tensor, und_W: Tensor, gen_W: Tensor, border: int, eps: float
) -> tuple[Tensor, Tensor]:
    total_TW, normed_TW = (x_TW.new_empty(x_TW.shape) for _ in range(2))
    _launch_forward(x_TW, residual_TW, und_W, gen_W, total_TW, normed_TW, border, eps)
    return total_TW, normed_TW


@_add_rms_norm.register_fake
def _(x_TW: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x_TW.new_empty(x_TW.shape), x_TW.new_empty(x_TW.shape)


@torch.library.custom_op("megabagel::rms_norm", mutates_args=())
def _rms_norm(x_TW: Tensor, und_W: Tensor, gen_W: Tensor, border: int, eps: float) -> Tensor:
    normed_TW = x_TW.new_empty(x_TW.shape)
    _launch_forward(x_TW, None, und_W, gen_W, None, normed_TW, border, eps)
    return normed_TW


@_rms_norm.register_fake
def _(x_TW: Tensor, *_: Any) -> Tensor:
    return x_TW.new_empty(x_TW.shape)


def _launch_forward(
    x_TW: Tensor, residual_TW: Tensor | None, und_W: Tensor, gen_W: Tensor,
    total_TW: Tensor | None, normed_TW: Tensor, border: int, eps: float,
) -> None:  # fmt: skip
    check_launch(norm_forward, x_TW)
    rows, width = x_TW.shape
    if rows:
        norm_forward[(rows,)](
            x_TW, residual_TW, und_W, gen_W, total_TW, normed_TW, border, rows, x_TW.stride(0),
            0 if residual_TW is None else residual_TW.stride(0), eps,
            HAS_RESIDUAL=residual_TW is not None, W=width, WP=triton.next_power_of_2(width), num_warps=WARPS,
        )  # fmt: skip


@torch.library.custom_op("megabagel::rms_norm_backward", mutates_args=())
def _backward(
    dnormed_TW: Tensor,
    dtotal_TW: Tensor | None,
    total_TW: Tensor,
    und_W: Tensor,
    gen_W: Tensor,
    border: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [T, W], dgamma of und, of gen); gradients lie dense."""
    rows, width = total_TW.shape
    und_programs, all_programs = programs(border, rows, BACKWARD_ROWS)
    dx_TW = total_TW.new_empty(rows, width)
    dgamma_PW = total_TW.new_empty(all_programs, width, dtype=torch.float32)
    if rows:
        norm_backward[(all_programs,)](
            total_TW, dnormed_TW, dtotal_TW, und_W, gen_W, dx_TW, dgamma_PW, border, rows, total_TW.stride(0), eps,
            HAS_DTOTAL=dtotal_TW is not None, W=width, WP=triton.next_power_of_2(width), ROWS=BACKWARD_ROWS,
            num_warps=WARPS,
        )  # fmt: skip
    return dx_TW, *sum_parts(dgamma_PW, und_programs, und_W)


@_backward.register_fake
def _(
    dnormed_TW: Tensor, dtotal_TW: Tensor | None, total_TW: Tensor, und_W: Tensor, gen_W: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return total_TW.new_empty(total_TW.shape), torch.empty_like(und_W), torch.empty_like(gen_W)


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, und_W, gen_W, ctx.border, ctx.eps = inputs
    ctx.save_for_backward(output[0], und_W, gen_W)


def _add_rms_norm_backward(ctx: Any, dtotal_TW: Tensor, dnormed_TW: Tensor) -> tuple[Tensor | None, ...]:
    total_TW, und_W, gen_W = ctx.saved_tensors
    dx_TW, dund_W, dgen_W = _backward(
        dnormed_TW.contiguous(), dtotal_TW.contiguous(), total_TW, und_W, gen_W, ctx.border, ctx.eps
    )
    return dx_TW, dx_TW, dund_W, dgen_W, None, None


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TW, und_W, gen_W, ctx.border, ctx.eps = inputs
    ctx.save_for_backward(x_TW, und_W, gen_W)


def _rms_norm_backward(ctx: Any, dnormed_TW: Tensor) -> tuple[Tensor | None, ...]:
    x_TW, und_W, gen_W = ctx.saved_tensors
    return *_backward(dnormed_TW.contiguous(), None, x_TW, und_W, gen_W, ctx.border, ctx.eps), None, None


_add_rms_norm.register_autograd(_add_rms_norm_backward, setup_context=_keep_total)
_rms_norm.register_autograd(_rms_norm_backward, setup_context=_keep_input)

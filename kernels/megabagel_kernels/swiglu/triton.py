"""SwiGLU as Triton kernels that keep only their input for backward and compute silu(gate) again.

A program handles COLS columns of one row.

Letters: T rows, F MLP width.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.checks import check_launch
from megabagel_kernels.rounding import round_like

COLS, WARPS = 1024, 4


@triton.jit
def _load(GATE_UP, stride, F, COLS: tl.constexpr):
    """Gate and up of a program's columns in fp32, with their row and column numbers and mask."""
    row = tl.program_id(0).to(tl.int64)  # int64: 57K rows of the 7B model (2 F = 37,888) reach 2^31 elements
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = columns < F
    gate = tl.load(GATE_UP + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * stride + F + columns, mask=inside, other=0.0).to(tl.float32)
    return gate, up, row, columns, inside


@triton.jit
def swiglu_forward(GATE_UP, Y, stride, F, COLS: tl.constexpr):
    """Y [T, F] = silu(gate) * up."""
    gate, up, row, columns, inside = _load(GATE_UP, stride, F, COLS)
    y = round_like(gate * tl.sigmoid(gate), Y) * up
    tl.store(Y + row * F + columns, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(GATE_UP, DY, DGATE_UP, stride, F, COLS: tl.constexpr):
    """DGATE_UP [T, 2 F], contiguous."""
    gate, up, row, columns, inside = _load(GATE_UP, stride, F, COLS)
    dy = tl.load(DY + row * F + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    to = DGATE_UP + row * 2 * F + columns
    tl.store(to, dgate.to(DGATE_UP.dtype.element_ty), mask=inside)
    tl.store(to + F, dup.to(DGATE_UP.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `functional.swiglu`, which has checked the argument."""
    return _swiglu(gate_up)


@torch.library.custom_op("megabagel::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    check_launch(swiglu_forward, gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y_TF = gate_up.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, COLS))
        swiglu_forward[grid](gate_up, y_TF, gate_up.stride(0), width, COLS=COLS, num_warps=WARPS)
    return y_TF


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("megabagel::swiglu_backward", mutates_args=())
def _backward(gate_up: Tensor, dy_TF: Tensor) -> Tensor:
    rows, width = dy_TF.shape
    dgate_up = gate_up.new_empty(gate_up.shape)
    if rows:
        grid = (rows, triton.cdiv(width, COLS))
        swiglu_backward[grid](gate_up, dy_TF, dgate_up, gate_up.stride(0), width, COLS=COLS, num_warps=WARPS)
    return dgate_up


@_backward.register_fake
def _(gate_up: Tensor, dy_TF: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _swiglu_backward(ctx: Any, dy_TF: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    return _backward(gate_up, dy_TF.contiguous())


_swiglu.register_autograd(_swiglu_backward, setup_context=_save_input)

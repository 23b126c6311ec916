"""SwiGLU as Triton kernels that keep only their input. Reference: `reference.swiglu`.

Letters: T rows, F width, COLS columns of one program.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.door import FLOATS, check_dtype, check_launch, check_layout
from megabagel_kernels.glue_triton import rounded

COLS, WARPS = 1024, 4


@triton.jit
def _load(GATE_UP, stride, F, COLS: tl.constexpr):
    """Gate and up of a program's piece of a row in fp32, and where it lies."""
    row = tl.program_id(0).to(tl.int64)  # the widest tensor of a layer: 57K rows of 7B reach 2^31 elements
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = columns < F
    gate = tl.load(GATE_UP + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * stride + F + columns, mask=inside, other=0.0).to(tl.float32)
    return gate, up, row, columns, inside


@triton.jit
def swiglu_forward(GATE_UP, Y, stride, F, COLS: tl.constexpr):
    """Y [T, F] = silu(gate) * up."""
    gate, up, row, columns, inside = _load(GATE_UP, stride, F, COLS)
    y = rounded(gate * tl.sigmoid(gate), Y) * up
    tl.store(Y + row * F + columns, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(GATE_UP, DY, DGATE_UP, stride, F, COLS: tl.constexpr):
    """DGATE_UP [T, 2 F], dense."""
    gate, up, row, columns, inside = _load(GATE_UP, stride, F, COLS)
    dy = tl.load(DY + row * F + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    to = DGATE_UP + row * 2 * F + columns
    tl.store(to, dgate.to(DGATE_UP.dtype.element_ty), mask=inside)
    tl.store(to + F, dup.to(DGATE_UP.dtype.element_ty), mask=inside)


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """`reference.swiglu` in one pass each way. Raises ValueError where shape, type or stride do not fit."""
    if gate_up_T2F.ndim != 2 or gate_up_T2F.shape[1] % 2:
        raise ValueError(
            f"gate_up_T2F has shape {tuple(gate_up_T2F.shape)}, expected [rows, an even number of columns]"
        )
    check_dtype("gate_up_T2F", gate_up_T2F, *FLOATS)
    check_layout("gate_up_T2F", gate_up_T2F[:1])  # offsets are 64-bit here, so one row stands for all
    return _swiglu(gate_up_T2F)


@torch.library.custom_op("megabagel::swiglu", mutates_args=())
def _swiglu(gate_up_T2F: Tensor) -> Tensor:
    check_launch(swiglu_forward, gate_up_T2F)
    rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    y_TF = gate_up_T2F.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, COLS))
        swiglu_forward[grid](gate_up_T2F, y_TF, gate_up_T2F.stride(0), width, COLS=COLS, num_warps=WARPS)
    return y_TF


@_swiglu.register_fake
def _(gate_up_T2F: Tensor) -> Tensor:
    return gate_up_T2F.new_empty(gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2)


@torch.library.custom_op("megabagel::swiglu_backward", mutates_args=())
def _backward(gate_up_T2F: Tensor, dy_TF: Tensor) -> Tensor:
    rows, width = dy_TF.shape
    dgate_up_T2F = gate_up_T2F.new_empty(gate_up_T2F.shape)
    if rows:
        grid = (rows, triton.cdiv(width, COLS))
        swiglu_backward[grid](
            gate_up_T2F, dy_TF, dgate_up_T2F, gate_up_T2F.stride(0), width, COLS=COLS, num_warps=WARPS
        )
    return dgate_up_T2F


@_backward.register_fake
def _(gate_up_T2F: Tensor, dy_TF: Tensor) -> Tensor:
    return gate_up_T2F.new_empty(gate_up_T2F.shape)


def _keep_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _swiglu_backward(ctx: Any, dy_TF: Tensor) -> Tensor:
    (gate_up_T2F,) = ctx.saved_tensors
    return _backward(gate_up_T2F, dy_TF.contiguous())


_swiglu.register_autograd(_swiglu_backward, setup_context=_keep_input)

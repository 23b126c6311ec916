"""RMS norm, rotary embedding and SwiGLU with backward passes of their own.

Autograd would take each apart into a dozen passes over memory, which on a CPU cost more than the arithmetic. Here each
direction takes a few, all of them plain torch operations: the same code serves every device and type. Statistics and
rotations are fp32 inside; results and gradients have the type of the input.

Letters: T rows, N heads, H channels of a head, F width of an MLP, W width of a norm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def rms_norm(x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension in fp32, cast to the type of x [..., W], then times weight."""
    return _RMSNorm.apply(x, weight_W, eps)


def rotate(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Turn channel i against channel i + H/2 of every head, in fp32; both halves of a table's row are the same."""
    return _Rotate.apply(x_TNH, cos_TH, sin_TH)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2 F], gate first -> [T, F]."""
    return _SwiGLU.apply(gate_up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_W, scale)
        return (x * scale).to(x.dtype).mul_(weight_W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_W, scale = ctx.saved_tensors
        # With n = x * scale and g = grad * weight: dx = scale * (g - n * mean(g * n)); dweight sums grad * n over rows.
        grad, x_wide = grad.to(scale.dtype), x.to(scale.dtype)
        product = grad * x_wide
        rows = product.reshape(-1, x.shape[-1])
        dweight_W = rows.T.mv(scale.flatten())
        mean = rows.mv(weight_W.to(scale.dtype)).view_as(scale).mul_(scale.square()).div_(x.shape[-1])
        dx = torch.mul(grad, weight_W, out=product).addcmul_(x_wide, mean, value=-1).mul_(scale)
        return dx.to(x.dtype), dweight_W.to(weight_W.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TH, sin_TH)
        return _turn(x_TNH, cos_TH, sin_TH, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        cos_TH, sin_TH = ctx.saved_tensors
        return _turn(grad_TNH, cos_TH, sin_TH, -1), None, None


def _turn(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, sign: int) -> Tensor:
    """Rotate by the angles of the tables, or back by them where `sign` is -1."""
    y_TNH = x_TNH * cos_TH[:, None]
    (first, second), (to_first, to_second) = x_TNH.to(y_TNH.dtype).chunk(2, -1), y_TNH.chunk(2, -1)
    sin_T1h = sin_TH[:, None, : sin_TH.shape[1] // 2]
    to_first.addcmul_(second, sin_T1h, value=-sign)
    to_second.addcmul_(first, sin_T1h, value=sign)
    return y_TNH.to(x_TNH.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        active = functional.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, active = ctx.saved_tensors
        result = torch.empty_like(gate_up)
        (gate, up), (dgate, dup) = gate_up.chunk(2, -1), result.chunk(2, -1)
        torch.mul(grad, active, out=dup)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        return result

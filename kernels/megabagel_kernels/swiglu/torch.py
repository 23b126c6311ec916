"""SwiGLU in plain torch with a hand-written backward, for any device and dtype.

Backward writes both halves of the gradient in place; autograd through `chunk` would make them apart and concatenate
them, another copy of the widest tensor of a layer. silu(gate) is kept for backward beside the input.

Letters: T rows, F MLP width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2 F], gate first -> [T, F]."""
    return _SwiGLU.apply(gate_up) if torch.is_grad_enabled() else _activated(gate_up)[0]


def _activated(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """(silu(gate) * up, silu(gate))."""
    gate, up = gate_up.chunk(2, -1)
    active = functional.silu(gate)
    return active * up, active


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        result, active = _activated(gate_up)
        ctx.save_for_backward(gate_up, active)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, active = ctx.saved_tensors
        result = torch.empty_like(gate_up)
        (gate, up), (dgate, dup) = gate_up.chunk(2, -1), result.chunk(2, -1)
        torch.mul(grad, active, out=dup)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        return result

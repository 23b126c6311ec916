"""RMSNorm in plain torch with a hand-written backward, for any device and dtype.

Autograd would take the formula apart into about a dozen operations, each a pass over memory, which on a CPU takes
longer than the arithmetic. Here each direction makes a few passes, and only x and one scale per row are saved.

Letters: T rows, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis in fp32, rounded to the dtype of x, then times gamma."""
    # A custom function costs about 15 us even where nothing needs a gradient, as much as the arithmetic of a decoded
    # token's norm.
    return _RMSNorm.apply(x, gamma, eps) if torch.is_grad_enabled() else _normalized(x, gamma, eps)[0]


def _normalized(x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normalized x, 1 / its root mean square [..., 1])."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # vector_norm accumulates in `wide` without a widened copy of x.
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype).mul_(gamma), scale


def add_rms_norm(residual_TD: Tensor, x_TD: Tensor, gamma_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + x, RMSNorm of that sum)."""
    sum_TD = residual_TD + x_TD
    return sum_TD, rms_norm(sum_TD, gamma_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        y, scale = _normalized(x, gamma, eps)
        ctx.save_for_backward(x, gamma, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, scale = ctx.saved_tensors
        # With n = x * scale and g = grad * gamma: dx = scale * (g - n * mean(g * n)); dgamma sums grad * n over rows.
        grad, x_wide = grad.to(scale.dtype), x.to(scale.dtype)
        product = grad * x_wide
        rows = product.reshape(-1, x.shape[-1])
        dgamma = rows.T.mv(scale.flatten())
        mean = rows.mv(gamma.to(scale.dtype)).view_as(scale).mul_(scale.square()).div_(x.shape[-1])
        dx = torch.mul(grad, gamma, out=product).addcmul_(x_wide, mean, value=-1).mul_(scale)
        return dx.to(x.dtype), dgamma.to(gamma.dtype), None

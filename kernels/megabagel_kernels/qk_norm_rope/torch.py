"""QK-norm and RoPE in plain torch with a hand-written backward, for any device and dtype.

The textbook `x * cos + rotate_half(x) * sin` makes a shuffled copy of x; here both halves are updated in place, and
backward is the rotation by the opposite angle, so that only the tables are saved.

Letters: U und rows, G gen rows, T = U + G; N heads, H head dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabagel_kernels.rms_norm.torch import rms_norm


def qk_norm_rope(
    und_UNH: Tensor, gen_GNH: Tensor, gamma_und_H: Tensor | None, gamma_gen_H: Tensor | None,
    cos_TH: Tensor, sin_TH: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """[T, N, H]; see `functional.qk_norm_rope`."""
    if len(gen_GNH) == 0 and not torch.is_grad_enabled():  # decoding: no calls on empty tensors, no copy
        normed = und_UNH if gamma_und_H is None else rms_norm(und_UNH, gamma_und_H, eps)
        return apply_rope(normed, cos_TH, sin_TH)
    if gamma_und_H is not None and gamma_gen_H is not None:
        und_UNH, gen_GNH = rms_norm(und_UNH, gamma_und_H, eps), rms_norm(gen_GNH, gamma_gen_H, eps)
    return apply_rope(torch.cat([und_UNH, gen_GNH]), cos_TH, sin_TH)


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """See `functional.apply_rope`."""
    return _Rope.apply(x_TNH, cos_TH, sin_TH) if torch.is_grad_enabled() else _rotate(x_TNH, cos_TH, sin_TH, 1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TH, sin_TH)
        return _rotate(x_TNH, cos_TH, sin_TH, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        cos_TH, sin_TH = ctx.saved_tensors
        return _rotate(grad_TNH, cos_TH, sin_TH, -1), None, None


def _rotate(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, sign: int) -> Tensor:
    """Rotate by the angles of the tables, or by their negatives where `sign` is -1."""
    y_TNH = x_TNH * cos_TH[:, None]
    (first, second), (to_first, to_second) = x_TNH.to(y_TNH.dtype).chunk(2, -1), y_TNH.chunk(2, -1)
    sin = sin_TH[:, None, : sin_TH.shape[1] // 2]
    to_first.addcmul_(second, sin, value=-sign)
    to_second.addcmul_(first, sin, value=sign)
    return y_TNH.to(x_TNH.dtype)

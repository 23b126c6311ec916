"""Torch references of the kernels around the linears: norms by expert, rotary embedding, SwiGLU, word loss.

Statistics are fp32 (fp64 for fp64 arguments), results have the type of the first argument. bf16 is rounded where the
released model rounds it: a norm before its gamma and after, SwiGLU after silu and at its end
(docs/bagel.md#layer). Tests and benchmarks share them; they are the definition, written to be read.

Letters: T rows, the first `border` of the understanding expert and the rest of the generation expert; W width of a
norm, N heads, H channels of a head, R = H / 2 rotary frequencies, P positions of a table, F width of an MLP, K rows
with a word to predict, I hidden width, V words.
"""

import torch
from torch import Tensor
from torch.nn import functional


def add_rms_norm(
    x_TW: Tensor, residual_TW: Tensor, und_W: Tensor, gen_W: Tensor, border: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(residual + x, its RMS norm with the gamma of each row's expert), both [T, W] (docs/bagel.md#layer)."""
    total_TW = (residual_TW.to(_wide(x_TW)) + x_TW).to(x_TW.dtype)
    return total_TW, rms_norm(total_TW, und_W, gen_W, border, eps)


def rms_norm(x_TW: Tensor, und_W: Tensor, gen_W: Tensor, border: int, eps: float) -> Tensor:
    """gamma * x / sqrt(mean(x^2) + eps) over the last axis [T, ..., W], gamma by the row's expert."""
    wide = x_TW.to(_wide(x_TW))
    scale = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
    und, gen = wide.mul(scale).to(x_TW.dtype).tensor_split([border])
    return torch.cat([und * und_W, gen * gen_W]).to(x_TW.dtype)


def qk_norm_rope(
    x_TNH: Tensor, und_H: Tensor, gen_H: Tensor, border: int,
    position_T: Tensor, cos_PR: Tensor, sin_PR: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """RMS norm of every head, then channel i turned against channel i + R by the angle of the row's position."""
    first, second = rms_norm(x_TNH, und_H, gen_H, border, eps).to(_wide(x_TNH)).chunk(2, -1)
    cos, sin = cos_PR[position_T][:, None], sin_PR[position_T][:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_TNH.dtype)


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2 F], gate first -> [T, F]."""
    gate, up = gate_up_T2F.to(_wide(gate_up_T2F)).chunk(2, -1)
    active = functional.silu(gate).to(gate_up_T2F.dtype)
    return (active * up).to(gate_up_T2F.dtype)


def linear_cross_entropy(hidden_KI: Tensor, weight_VI: Tensor, label_K: Tensor, ignore: int = -100) -> Tensor:
    """Cross-entropy per row [K] of logits hidden @ weight^T, 0 where the label is `ignore`; holds all logits."""
    logits_KV = functional.linear(hidden_KI, weight_VI)
    return functional.cross_entropy(logits_KV.to(_wide(logits_KV)), label_K, reduction="none", ignore_index=ignore)


def _wide(x: Tensor) -> torch.dtype:
    """The type of statistics: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)

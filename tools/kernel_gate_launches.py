"""Every Triton launch that the project ships, at the sizes of a 7B layer but few tokens, on plain CPU tensors.

Each entry calls a public function forward and backward; `kernel_gate` turns the launches behind it into compilations.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
from megabagel_kernels.attention.configs import configs_for
from megabagel_kernels.attention.mask import AttentionRanges
from megabagel_kernels.attention.triton import plan_triton, triton_attention_lse
from megabagel_kernels.float8 import E4M3, E5M2, ROW_32, ROW_128, Format, Tiles, quantize
from megabagel_kernels.flow import KeyedTarget, LatentImages, Reference, flow_losses, noised_rows
from megabagel_kernels.linear_cross_entropy import linear_cross_entropy
from megabagel_kernels.qk_norm_rope import qk_norm_rope
from megabagel_kernels.rms_norm import add_rms_norm, rms_norm
from megabagel_kernels.swiglu import swiglu
from torch import Tensor

TOKENS = 128
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

ATTENTION = (
    (28, 4, 128, BF16, False),
    (28, 4, 128, BF16, True),
    (28, 4, 128, FP16, False),
    (14, 2, 64, BF16, False),
    (16, 16, 72, BF16, False),
    (16, 16, 80, BF16, False),
    (28, 4, 96, BF16, False),
    (28, 4, 128, FP32, False),
)
"""Query heads, key/value heads, head dim, type, in parts."""


@dataclass(frozen=True)
class Case:
    """One call with its backward, for an architecture such as 90."""

    name: str
    run: Callable[[int], None]
    tensor_cores: bool = False


def cases() -> list[Case]:
    """All of them."""
    return [
        *(_attention_case(*kind) for kind in ATTENTION),
        Case("bf16 latents", lambda _: _noise()),
        Case("bf16, keyed, reference", lambda _: _flow_loss(keyed=True)),
        Case("bf16, velocity", lambda _: _flow_loss(keyed=False)),
        Case("bf16, 3584", lambda _: _norm(residual=False)),
        Case("bf16, 3584, residual", lambda _: _norm(residual=True)),
        Case("bf16, 28 heads of 128", lambda _: _rope()),
        Case("bf16, 18944", lambda _: swiglu(_leaf(TOKENS, 2 * 18944), engine="triton").sum().backward()),
        Case("bf16, 3584, e4m3 1x128", lambda _: _quantized(E4M3, ROW_128)),
        Case("bf16, 3584, e5m2 1x32", lambda _: _quantized(E5M2, ROW_32)),
        Case("bf16 logits", lambda _: _cross_entropy()),
    ]


def _attention_case(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, parts: bool) -> Case:
    name = f"{_short(dtype)}, {heads}/{kv_heads} heads of {head_dim}" + (", in parts" if parts else "")

    def run(arch: int) -> None:
        _attention(arch, (heads, kv_heads), head_dim, dtype, parts)

    return Case(name, run, tensor_cores=dtype != FP32)


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


def _quantized(code: Format, tiles: Tiles) -> None:
    quantize(_leaf(TOKENS, 3584).detach(), code, tiles, engine="triton")


def _leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def _attention(arch: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, parts: bool) -> None:
    """Slices of one fused projection; with `parts` as a rank of many computes it, fp32 and with a gradient of lse."""
    configs = configs_for(triton.__version__, arch, dtype, head_dim)
    few, many = replace(configs, split_below=0), replace(configs, split_below=2**30)
    position, zero = np.arange(TOKENS, dtype=np.int32), np.zeros(TOKENS, np.int32)
    plan = plan_triton(AttentionRanges(position, zero, position + 1, zero, zero), many if parts else few)
    q, k, v = _leaf(TOKENS, heads[0] + 2 * heads[1], head_dim, dtype=dtype).split([heads[0], heads[1], heads[1]], 1)
    out, lse = triton_attention_lse(q, k, v, plan, out_dtype=FP32 if parts else None)
    ((out.sum() + lse.sum()) if parts else out.sum()).backward()


def _noise() -> None:
    side, count = torch.full((4,), 32), torch.arange(4)
    images = LatentImages(
        torch.ones(4 * 16 * 32 * 32, dtype=BF16), count * 16 * 32 * 32, side, side, torch.ones(4), count, 16, 2
    )
    image, patch_index = torch.zeros(TOKENS, dtype=torch.int32), torch.arange(TOKENS, dtype=torch.int32)
    noised_rows(images, image, patch_index, BF16, engine="triton")


def _flow_loss(keyed: bool) -> None:
    rows, weight, index = torch.ones(TOKENS, 64, dtype=BF16), torch.ones(TOKENS), torch.arange(TOKENS)
    target = KeyedTarget(rows, index, index.int()) if keyed else rows
    reference = Reference(rows, weight) if keyed else None
    flow_losses(_leaf(TOKENS, 64), target, weight, reference, engine="triton").total_G.sum().backward()


def _norm(residual: bool) -> None:
    x, gamma = _leaf(TOKENS, 3584), _leaf(3584)
    if residual:
        total, normed = add_rms_norm(_leaf(TOKENS, 3584), x, gamma, 1e-6, engine="triton")
        (total.sum() + normed.sum()).backward()
    else:
        rms_norm(x, gamma, 1e-6, engine="triton").sum().backward()


def _rope() -> None:
    """Queries as slices of the fused projections of both experts."""
    und, gen = (_leaf(TOKENS // 2, 36, 128)[:, :28] for _ in range(2))
    table = torch.ones(TOKENS, 128)
    qk_norm_rope(und, gen, _leaf(128), _leaf(128), table, table, 1e-6, engine="triton").sum().backward()


def _cross_entropy() -> None:
    hidden, weight, labels = _leaf(16, 16), _leaf(8192, 16), torch.arange(16)
    linear_cross_entropy(hidden, weight, labels, engine="triton").sum().backward()

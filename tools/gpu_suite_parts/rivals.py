"""Ways to compute attention under BAGEL's mask: ours, FlexAttention twice, and dense attention sample by sample.

Letters: S tokens, N query heads, M key/value heads, H head dim.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from megabagel_kernels.attention.configs import configs_here
from megabagel_kernels.attention.flex import BLOCK, plan_flex
from megabagel_kernels.attention.mask import dense_mask
from megabagel_kernels.attention.schedule import classify, visited_pairs
from megabagel_kernels.attention.triton import plan_triton, triton_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from gpu_suite_parts.packs import Rows
from gpu_suite_parts.setting import Setting
from gpu_suite_parts.timing import median_ms
from megabagel.sequence.items import Mode

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rival:
    """One way, ready for one pack."""

    attend: Attend
    """(q [S, N, H], k and v [S, M, H]) -> [S, N, H]."""
    in_sequence: bool = False
    """Whether it takes tokens in sequence order, not as [und | gen]."""
    backward: bool = True
    visited: int | None = None
    """(query, key) pairs inside the blocks that forward visits."""
    notes: dict[str, Any] = field(default_factory=dict)
    mask_ms: float = 0.0
    """Making the mask on the device, once per step and not once per layer."""


def ours(setting: Setting, rows: Rows, heads: int, head_dim: int) -> Rival:
    """The Triton engine; its plan is made on the CPU by a loader worker."""
    configs = configs_here(torch.bfloat16, head_dim)
    start = time.perf_counter()
    plan = plan_triton(rows.ranges, configs)
    notes = {"plan_cpu_ms": 1e3 * (time.perf_counter() - start)}
    plan = plan.to(setting.device)
    size = configs.forward.rows, configs.forward.cols
    visited = visited_pairs(classify(rows.ranges, *size), *size)
    return Rival(lambda q, k, v: triton_attention(q, k, v, plan), visited=visited, notes=notes)


def flex_with_our_lists(setting: Setting, rows: Rows, heads: int, head_dim: int) -> Rival:
    """FlexAttention on the block lists of our schedule, compiled for these very shapes."""
    start = time.perf_counter()
    plan = plan_flex(rows.ranges).to(setting.device)
    notes = {"plan_cpu_ms": 1e3 * (time.perf_counter() - start)}
    visited = visited_pairs(classify(rows.ranges, BLOCK, BLOCK), BLOCK, BLOCK)
    return Rival(_flex(setting, plan.mask), backward=not setting.toy, visited=visited, notes=notes)


def flex_as_bagel(setting: Setting, rows: Rows, heads: int, head_dim: int) -> Rival:
    """FlexAttention as the released trainer calls it: a mask per head, made anew every step (docs/bagel.md#mask).

    Its copies to pad and to permute q, k and v are left out.
    """

    ids = _ids(setting, rows)

    def make(of_heads: int | None) -> BlockMask:
        return create_block_mask(
            _bagel_rule(*ids), 1, of_heads, rows.ranges.queries, rows.ranges.keys,
            device=setting.device, BLOCK_SIZE=BLOCK, _compile=not setting.toy,
        )  # fmt: skip

    per_head_ms, shared_ms = (median_ms(setting, partial(make, of_heads)) for of_heads in (heads, None))
    attend = _flex(setting, make(heads))
    notes = {"mask_shared_ms": shared_ms}
    return Rival(attend, in_sequence=True, backward=not setting.toy, notes=notes, mask_ms=per_head_ms)


def _ids(setting: Setting, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Per token, in sequence order: its sample; its split unless that is causal; its split if that is noised."""
    sample, image, noised = [], [], []
    for number, plan in enumerate(rows.pack.samples):
        for split in plan.segments:
            own = len(image)
            sample += [number] * split.length
            image += [-1 if split.mode is Mode.CAUSAL else own] * split.length
            noised += [own if split.mode is Mode.NOISE else -1] * split.length
    sample_S, image_S, noised_S = (torch.tensor(x).to(setting.device) for x in (sample, image, noised))
    return sample_S, image_S, noised_S


def _bagel_rule(sample_S: Tensor, image_S: Tensor, noised_S: Tensor) -> Callable[..., Tensor]:
    """The mask by ids per token (BAGEL section 2.3), a new function every step."""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_image = (image_S[query] == image_S[key]) & (image_S[query] >= 0)
        noise_of_others = (noised_S[key] >= 0) & (noised_S[query] != noised_S[key])
        return ((query >= key) | same_image) & ~noise_of_others & (sample_S[query] == sample_S[key])

    return visible


def _flex(setting: Setting, mask: BlockMask) -> Attend:
    kernel = _kernel(compiled=not setting.toy)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return kernel(*heads_first, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return attend


@cache
def _kernel(compiled: bool) -> Any:
    """Compiled once for each shape; packs of one shape share the code."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def dense_by_sample(setting: Setting, rows: Rows, heads: int, head_dim: int) -> Rival:
    """SDPA with a bias of 0 and -inf for each sample, by the memory-efficient kernel: BAGEL's other way."""
    stops = np.cumsum([sample.tokens for sample in rows.pack.samples])
    spans = [slice(stop - sample.tokens, stop) for stop, sample in zip(stops, rows.pack.samples, strict=True)]
    biases = [_bias(setting, rows, span) for span in spans]
    backend = SDPBackend.MATH if setting.toy else SDPBackend.EFFICIENT_ATTENTION

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        with sdpa_kernel(backend):
            outs = [
                scaled_dot_product_attention(q[:, :, span], k[:, :, span], v[:, :, span], attn_mask=bias)
                for span, bias in zip(spans, biases, strict=True)
            ]
        return torch.cat(outs, 2)[0].transpose(0, 1)

    return Rival(attend, in_sequence=True, notes={"mask_gib": sum(bias.nbytes for bias in biases) / 2**30})


def _bias(setting: Setting, rows: Rows, span: slice) -> Tensor:
    """bf16 [1, 1, s, s] of one sample, its rows on whole 16 bytes as the kernel wants them."""
    tokens = np.arange(span.start, span.stop)
    hidden = torch.from_numpy(~dense_mask(rows.pack.codes.take(tokens, tokens))).to(setting.device)
    room = torch.zeros(len(tokens), -(-len(tokens) // 8) * 8, dtype=torch.bfloat16, device=setting.device)
    return room[:, : len(tokens)].masked_fill_(hidden, -math.inf)[None, None]

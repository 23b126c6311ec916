"""Attention on the device against its dense definition in fp64, which is made for one key/value head at a time.

Letters: T queries, S keys, N query heads, M key/value heads, H head dim.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from megabagel_kernels.attention.configs import configs_here
from megabagel_kernels.attention.mask import AttentionRanges, dense_mask
from megabagel_kernels.attention.reference import attention_reference
from megabagel_kernels.attention.triton import TritonPlan, plan_triton, triton_attention_lse
from torch import Tensor

from gpu_suite_parts.packs import TIMED, fill, rows_of, tiny
from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.setting import Setting
from tests.kernels.attention.cases import plain_attention
from tests.kernels.guards import guarded, guarded_outputs

NAMES = ("out", "lse", "dq", "dk", "dv")
HEADS = ((28, 4), (12, 2), (7, 1))
TOY_HEADS = ((4, 2), (6, 1), (7, 1))
HEAD_DIMS = (128, 64, 72)

FP32_BOUND = 1e-5
"""Relative error of fp32; the exponentials of a GPU are good to 2^-22. Products in TF32 would be 50 times over."""

BLIND = 37
"""Padding tokens at the end of a pack: they see nothing and nothing sees them."""


@dataclass(frozen=True)
class Case:
    """One call: its inputs are slices of one fused projection."""

    number: int
    dtype: torch.dtype
    head_dim: int
    heads: tuple[int, int]

    @property
    def split(self) -> bool:
        """Whether dk and dv are made per query head; both ways occur with every number of heads."""
        return self.number % 2 == 0

    @property
    def name(self) -> str:
        """For the report."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} H={self.head_dim} {self.heads[0]}/{self.heads[1]}{' split' if self.split else ''}"


def run(setting: Setting, report: Report) -> None:
    """Every head dim with every number of heads in bf16, each of both once in fp32, one in fp16."""
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    all_heads = setting.pick(HEADS, TOY_HEADS)
    calls = [(bf16, dim, heads) for dim, heads in itertools.product(HEAD_DIMS, all_heads)]
    calls += [(fp32, dim, heads) for dim, heads in zip(HEAD_DIMS, all_heads, strict=True)]
    calls += [(fp16, 128, (7, 1))]
    for number, call in enumerate(calls):
        case = Case(number, *call)
        report.check("check-attention", case.name, "attention", lambda case=case: check(setting, case))


def check(setting: Setting, case: Case) -> Result:
    """Errors of out, lse and gradients relative to fp64, their bounds, and whether a second run gave the same bits."""
    kinds = setting.pick(list(TIMED.values()), [tiny])
    pack = fill(kinds[case.number % len(kinds)], setting.pick(6000, 120))
    ranges = rows_of(pack).ranges.padded(BLIND)
    seen_T = torch.from_numpy(dense_mask(ranges).any(1)).to(setting.device)
    qkv, grads = draw(setting, case, ranges)
    configs = replace(configs_here(case.dtype, case.head_dim), split_below=10**6 if case.split else 0)
    plan = plan_triton(ranges, configs).to(setting.device)
    with guarded_outputs():
        found, again = (by_kernel(qkv, grads, seen_T, plan) for _ in range(2))
    repeats = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    blind_right = torch.equal(found[1].isneginf(), ~seen_T.expand_as(found[1]))
    errors, bounds = compare(found, qkv, grads, ranges, seen_T)
    right = repeats and blind_right and all(errors[name] <= bounds[name] for name in NAMES)
    result: Result = {"right": right, "repeats": repeats, "nothing seen": blind_right}
    return result | {name: f"{errors[name]:.1e} <= {bounds[name]:.1e}" for name in NAMES}


def draw(setting: Setting, case: Case, ranges: AttentionRanges) -> tuple[list[Tensor], list[Tensor]]:
    """q [T, N, H], k and v [S, M, H] as slices of a fused projection between NaN; gradients of out and lse."""
    heads, kv_heads = case.heads
    rows, width = ranges.queries, (heads + 2 * kv_heads) * case.head_dim
    fused = guarded(setting.normal(rows, width, key=case.name, dtype=case.dtype))
    qkv = fused.unflatten(1, (-1, case.head_dim)).split([heads, kv_heads, kv_heads], 1)
    grad = setting.normal(rows, heads, case.head_dim, key=f"{case.name} out", dtype=case.dtype)
    return list(qkv), [grad, setting.normal(heads, rows, key=f"{case.name} lse", dtype=torch.float32)]


def by_kernel(qkv: list[Tensor], grads: list[Tensor], seen_T: Tensor, plan: TritonPlan) -> list[Tensor]:
    """out, lse, dq, dk, dv; whatever reaches an lse of -inf as gradient has no effect."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out, lse = triton_attention_lse(*leaves, plan)
    found = torch.autograd.grad([out, lse], leaves, [grads[0], grads[1].masked_fill(~seen_T, math.nan)])
    return [out.detach(), lse.detach(), *found]


def compare(
    found: list[Tensor], qkv: list[Tensor], grads: list[Tensor], ranges: AttentionRanges, seen_T: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """(errors, bounds) by name; the bound of 16-bit types is twice the error of plain torch in that type.

    dq and dk vanish where each query sees one key, so the norm of dv counts as their least norm.
    """
    low, kv_heads = qkv[0].dtype, qkv[1].shape[1]
    group = qkv[0].shape[1] // kv_heads
    wrong, plain_wrong, norm = (dict.fromkeys(NAMES, 0.0) for _ in range(3))
    for head in range(kv_heads):
        of_q, of_kv = slice(head * group, (head + 1) * group), slice(head, head + 1)
        mine = [found[0][:, of_q], found[1][of_q], found[2][:, of_q], found[3][:, of_kv], found[4][:, of_kv]]
        inputs = [qkv[0][:, of_q], qkv[1][:, of_kv], qkv[2][:, of_kv]]
        upstream = [grads[0][:, of_q], grads[1][of_q].masked_fill(~seen_T, 0)]
        truth = dense([x.double() for x in inputs], upstream, ranges, seen_T)
        plain = mine if low == torch.float32 else dense(inputs, upstream, ranges, seen_T)
        for name, x, rounded, exact in zip(NAMES, mine, plain, truth, strict=True):
            x = x.masked_fill(~seen_T, 0) if name == "lse" else x
            wrong[name] += float((x.double() - exact).square().sum())
            plain_wrong[name] += float((rounded.double() - exact).square().sum()) if low != torch.float32 else 0.0
            norm[name] += float(exact.square().sum())
    norm["dq"], norm["dk"] = max(norm["dq"], norm["dv"]), max(norm["dk"], norm["dv"])
    errors = {name: math.sqrt(wrong[name] / norm[name]) for name in NAMES}
    return errors, {name: max(2 * math.sqrt(plain_wrong[name] / norm[name]), FP32_BOUND) for name in NAMES}


def dense(inputs: list[Tensor], upstream: list[Tensor], ranges: AttentionRanges, seen_T: Tensor) -> list[Tensor]:
    """out, lse (0 where nothing is seen), dq, dk, dv with all scores in memory: the reference in fp64, else plain."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    if inputs[0].dtype == torch.float64:
        out, lse = attention_reference(*leaves, ranges)
    else:
        out, lse = plain_attention(*leaves, ranges)
    found = torch.autograd.grad([out, lse], leaves, [x.to(y.dtype) for x, y in zip(upstream, (out, lse), strict=True)])
    return [out.detach(), lse.detach().masked_fill(~seen_T, 0), *found]

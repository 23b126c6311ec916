"""Kernels that memory bounds: bytes that they cannot avoid over their time, beside what a copy reaches."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megabagel_kernels.flow import KeyedTarget, flow_losses, noised_rows
from megabagel_kernels.linear_cross_entropy.triton import TritonPasses

from gpu_suite_parts.check_others import EPS, sizes
from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.setting import Setting
from gpu_suite_parts.timing import forward_and_backward, median_ms
from tests.kernels.case import Case
from tests.kernels.flow.cases import FEATURES, latents
from tests.kernels.qk_norm_rope import cases as qk_norm_rope
from tests.kernels.rms_norm import cases as rms_norm
from tests.kernels.swiglu import cases as swiglu


@dataclass(frozen=True)
class Operation:
    """A call, and how many bf16 numbers it cannot avoid to move each way."""

    kernel: str
    name: str
    case: Case
    forward: int
    backward: int


def run(setting: Setting, report: Report) -> None:
    """Each at the widths of the 7B model, on the rows of one pack."""
    for operation in operations(setting):
        report.measure("memory", operation.name, operation.kernel, partial(measure, setting, report, operation))
    report.measure("memory", "flow loss", "flow", partial(flow_loss, setting, report))
    report.measure("memory", "noised rows", "flow", partial(noising, setting, report))
    report.measure("memory", "cross-entropy passes", "cross-entropy", partial(slice_passes, setting, report))


def operations(setting: Setting) -> Iterator[Operation]:
    """Norms, rotation and SwiGLU; backward reads what forward read, and gradients, and writes gradients."""
    rows, width, head_dim, ffn = setting.pick((36_864, 3584, 128, 18_944), (24, 64, 16, 96))
    unit, mlp, bf16 = rows * width, rows * ffn, torch.bfloat16
    add_norm, norm = (make(setting, rows, width, bf16, EPS) for make in (rms_norm.add_norm, rms_norm.norm))
    yield Operation("norm", "add + norm", add_norm, 4 * unit, 4 * unit)
    yield Operation("norm", "norm", norm, 2 * unit, 3 * unit)
    heads = qk_norm_rope.heads(setting, rows // 2, rows - rows // 2, width // head_dim, head_dim, bf16, EPS)
    yield Operation("rope", "QK-norm + RoPE", heads, 2 * unit, 3 * unit)
    yield Operation("swiglu", "SwiGLU", swiglu.mlp(setting, rows, ffn, bf16), 3 * mlp, 5 * mlp)


def measure(setting: Setting, report: Report, operation: Operation) -> Result:
    """Times of both ways and their rates."""
    found = forward_and_backward(setting, operation.case.ours, operation.case.leaves)
    for way, moved in (("forward", operation.forward), ("backward", operation.backward)):
        found |= rate(setting, report, way, 2 * moved, found[f"{way}_ms"])
    return found


def rate(setting: Setting, report: Report, way: str, moved: int, time_ms: float) -> Result:
    """GB/s, and the share of what a copy reaches; nothing in a toy."""
    if setting.toy:
        return {}
    found = {f"{way}_gb_per_s": moved / time_ms / 1e6}
    copy = report.ceiling("copy", "gb_per_s")
    return found if copy is None else found | {f"{way}_of_copy": found[f"{way}_gb_per_s"] / copy}


def flow_loss(setting: Setting, report: Report) -> Result:
    """Losses and their gradient, with noise drawn again: reads v and x_0 in bf16, writes the gradient in fp32."""
    rows = setting.pick(32_768, 24)
    v, x0 = (setting.normal(rows, FEATURES, key=f"flow {name}") for name in ("v", "x0"))
    target = KeyedTarget(x0, setting.integers(2**62, rows, key="seeds"), setting.integers(4096, rows, key="places"))
    weight = setting.normal(rows, key="weights", dtype=torch.float32).abs()
    v.requires_grad_()
    time_ms = median_ms(setting, lambda: flow_losses(v, target, weight, engine="triton"))
    return {"forward_ms": time_ms} | rate(setting, report, "forward", 8 * v.numel(), time_ms)


def noising(setting: Setting, report: Report) -> Result:
    """Patches, noise and gather: reads latents in bf16, writes them noised, and their velocity, in fp32."""
    images, image_G, patch_index_G = latents(setting, sizes(setting), torch.bfloat16)
    time_ms = median_ms(setting, lambda: noised_rows(images, image_G, patch_index_G, engine="triton"))
    return {"forward_ms": time_ms} | rate(setting, report, "forward", 10 * images.latents.numel(), time_ms)


def slice_passes(setting: Setting, report: Report) -> Result:
    """Folding a slice of logits into the losses reads it; its gradient, in place, reads and writes it."""
    rows, tokens = setting.pick((10_240, 8192), (9, 130))
    logits = setting.normal(rows, tokens, key="logits")
    label = setting.integers(tokens, rows, key="labels")
    lse, target = (torch.zeros(rows, device=setting.device) for _ in range(2))
    upstream = setting.normal(rows, key="upstream", dtype=torch.float32)
    passes = TritonPasses()
    fold_ms = median_ms(setting, lambda: passes.accumulate_(logits, label, lse, target))
    gradient_ms = median_ms(setting, lambda: passes.gradient_(logits, label, lse, upstream))
    found: Result = {"forward_ms": fold_ms, "backward_ms": gradient_ms}
    found |= rate(setting, report, "forward", 2 * logits.numel(), fold_ms)
    return found | rate(setting, report, "backward", 4 * logits.numel(), gradient_ms)

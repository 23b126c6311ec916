"""Kernels that memory bounds: bytes that they cannot avoid over their time, beside what a copy reaches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megabagel_kernels import flow_triton, glue_triton_norm, glue_triton_rope, glue_triton_swiglu
from megabagel_kernels.flow import KeyedTarget
from megabagel_kernels.linear_cross_entropy_triton import TritonPasses
from torch import Tensor

from gpu_suite_parts.check_others import EPS, FEATURES, latents
from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.setting import Setting
from gpu_suite_parts.timing import forward_and_backward, median_ms


@dataclass(frozen=True)
class Operation:
    """A function of `leaves`, and how many bf16 numbers it cannot avoid to move each way."""

    kernel: str
    name: str
    function: Callable[..., Any]
    leaves: list[Tensor]
    forward: int
    backward: int


def run(setting: Setting, report: Report) -> None:
    """Each at the widths of the 7B model, on the rows of one pack."""
    for operation in operations(setting):
        report.measure("memory", operation.name, operation.kernel, partial(measure, setting, report, operation))
    report.measure("memory", "flow loss", "flow", partial(flow_loss, setting, report))
    report.measure("memory", "noised rows", "flow", partial(noised_rows, setting, report))
    report.measure("memory", "cross-entropy passes", "cross-entropy", partial(word_passes, setting, report))


def operations(setting: Setting) -> Iterator[Operation]:
    """Norms, rotation and SwiGLU; backward reads what forward read, and gradients, and writes gradients."""
    rows, width, head, ffn = setting.pick((36_864, 3584, 128, 18_944), (24, 64, 16, 96))
    border, unit, mlp = rows // 2, rows * width, rows * ffn
    x, residual = (setting.normal(rows, width, key=f"memory {name}") for name in "xr")
    gammas = [1 + setting.normal(width, key=f"gamma {i}") for i in range(2)]
    add_norm, norm = (
        lambda *leaves, run=run: run(*leaves, border, EPS)
        for run in (glue_triton_norm.add_rms_norm, glue_triton_norm.rms_norm)
    )
    yield Operation("norm", "add + norm", add_norm, [x, residual, *gammas], 4 * unit, 4 * unit)
    yield Operation("norm", "norm", norm, [x, *gammas], 2 * unit, 3 * unit)
    positions = setting.integers(rows, rows, key="positions")
    angle_PR = setting.normal(rows, head // 2, key="angles", dtype=torch.float32)
    tables = border, positions, angle_PR.cos(), angle_PR.sin(), EPS
    leaves = [x.unflatten(1, (-1, head)), *(1 + setting.normal(head, key=f"head gamma {i}") for i in range(2))]
    rope = Operation(
        "rope", "QK-norm + RoPE", lambda *x: glue_triton_rope.qk_norm_rope(*x, *tables), leaves, 2 * unit, 3 * unit
    )
    yield rope
    gate_up = setting.normal(rows, 2 * ffn, key="gate and up")
    yield Operation("swiglu", "SwiGLU", glue_triton_swiglu.swiglu, [gate_up], 3 * mlp, 5 * mlp)


def measure(setting: Setting, report: Report, operation: Operation) -> Result:
    """Times of both ways and their rates."""
    found = forward_and_backward(setting, operation.function, operation.leaves)
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
    time_ms = median_ms(setting, lambda: flow_triton.flow_losses(v, target, weight))
    return {"forward_ms": time_ms} | rate(setting, report, "forward", 8 * v.numel(), time_ms)


def noised_rows(setting: Setting, report: Report) -> Result:
    """Patches, noise and gather: reads latents in bf16, writes them noised, and their velocity, in fp32."""
    images, image_G, place_G = latents(setting, torch.bfloat16)
    time_ms = median_ms(setting, lambda: flow_triton.noised_rows(images, image_G, place_G))
    return {"forward_ms": time_ms} | rate(setting, report, "forward", 10 * images.cells.numel(), time_ms)


def word_passes(setting: Setting, report: Report) -> Result:
    """Folding a slice of logits into the losses reads it; its gradient, in place, reads and writes it."""
    rows, words = setting.pick((10_240, 8192), (9, 130))
    logits = setting.normal(rows, words, key="logits")
    label = setting.integers(words, rows, key="labels")
    lse, target = (torch.zeros(rows, device=setting.device) for _ in range(2))
    upstream = setting.normal(rows, key="upstream", dtype=torch.float32)
    passes = TritonPasses()
    fold_ms = median_ms(setting, lambda: passes.fold_(logits, label, lse, target))
    gradient_ms = median_ms(setting, lambda: passes.gradient_(logits, label, lse, upstream))
    found: Result = {"forward_ms": fold_ms, "backward_ms": gradient_ms}
    found |= rate(setting, report, "forward", 2 * logits.numel(), fold_ms)
    return found | rate(setting, report, "backward", 4 * logits.numel(), gradient_ms)

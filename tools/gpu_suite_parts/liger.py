"""Liger's Triton kernels for the same operations, where `liger_kernel` is installed; a row says so where it is not.

Not the same work in all of them: Liger's rotary embedding has no norm and works in place, its SwiGLU takes two tensors,
and its linear + cross-entropy makes the gradients in forward, which fits one upstream gradient for all rows: there only
the sums of both ways compare.

Letters: T rows, H head dim.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from megabagel_kernels.linear_cross_entropy import linear_cross_entropy
from megabagel_kernels.qk_norm_rope import qk_norm_rope
from megabagel_kernels.rms_norm import rms_norm
from megabagel_kernels.swiglu import swiglu
from torch import Tensor

from gpu_suite_parts.check_others import EPS
from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.setting import Setting
from gpu_suite_parts.timing import forward_and_backward

Calls = dict[str, tuple[str, Callable[..., Any], list[Tensor]]]
"""By operation: our kernel that must be right, our function, its arguments."""


def run(setting: Setting, report: Report) -> None:
    """Forward and backward of ours and of Liger's, on the same inputs."""
    rows, predicted = setting.pick((36_864, 10_240), (24, 9))
    angles = setting.normal(rows, setting.pick(64, 8), key="liger angles", dtype=torch.float32)
    angle_TH = torch.cat([angles, angles], 1)
    label = setting.integers(setting.pick(152_064, 130), predicted, key="liger labels")
    calls = ours(setting, rows, angle_TH, label)
    for name, (kernel, function, leaves) in calls.items():
        report.measure("liger", f"{name}: ours", kernel, partial(forward_and_backward, setting, function, leaves))
        rival = partial(_liger, setting, name, leaves, angle_TH, label)
        report.measure("liger", f"{name}: Liger", kernel, rival, ours=False)


def ours(setting: Setting, rows: int, angle_TH: Tensor, label: Tensor) -> Calls:
    """At the widths of the 7B model."""
    width, heads, head, ffn, vocab = setting.pick((3584, (28, 4), 128, 18_944, 152_064), (64, (2, 1), 16, 96, 130))
    x, gamma = setting.normal(rows, width, key="liger x"), 1 + setting.normal(width, key="liger gamma")
    q, k = (setting.normal(rows, count, head, key=f"liger {count} heads") for count in heads)
    gammas = [1 + setting.normal(head, key=f"liger head gamma {i}") for i in range(2)]
    cos_TH, sin_TH, num_und = angle_TH.cos(), angle_TH.sin(), rows // 2

    def rotate(x: Tensor) -> Tensor:
        return qk_norm_rope(x[:num_und], x[num_und:], *gammas, cos_TH, sin_TH, EPS, engine="triton")

    hidden = setting.normal(len(label), width, key="liger hidden")
    weight = setting.normal(vocab, width, key="liger head")
    gate_up = setting.normal(rows, 2 * ffn, key="liger gate and up")
    token_loss = partial(linear_cross_entropy, label_Q=label, engine="triton")
    return {
        "norm": ("norm", lambda x, gamma: rms_norm(x, gamma, EPS, engine="triton"), [x, gamma]),
        "rotation": ("rope", lambda q, k: (rotate(q), rotate(k)), [q, k]),
        "SwiGLU": ("swiglu", partial(swiglu, engine="triton"), [gate_up]),
        "linear + cross-entropy": ("cross-entropy", lambda h, w: token_loss(h, w).sum(), [hidden, weight]),
    }


def _liger(setting: Setting, name: str, leaves: list[Tensor], angle_TH: Tensor, label: Tensor) -> Result:
    if find_spec("liger_kernel") is None:
        return {"absent": "liger_kernel is not installed: pip install liger-kernel"}
    functional = import_module("liger_kernel.transformers.functional")
    tables = [x[None].bfloat16() for x in (angle_TH.cos(), angle_TH.sin())]

    def rotation(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return functional.liger_rope(*(x.transpose(0, 1)[None] for x in (q, k)), *tables)

    def token_loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.liger_fused_linear_cross_entropy(hidden, weight, label, reduction="sum")

    calls: dict[str, Callable[..., Any]] = {
        "norm": lambda x, gamma: functional.liger_rms_norm(x, gamma, EPS, in_place=False),
        "rotation": rotation,
        "SwiGLU": lambda gate_up: functional.liger_swiglu(*(half.contiguous() for half in gate_up.chunk(2, 1))),
        "linear + cross-entropy": token_loss,
    }
    return forward_and_backward(setting, calls[name], leaves)

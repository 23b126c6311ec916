"""How long every attention configuration takes to compile, and how fast it then runs.

Each compiles in a process of its own, several at a time, into a cache that starts empty, as in the first step of a run.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from unittest import mock

import torch
from megabagel_kernels.attention.configs import INTERPRETER, Config, Configs, configs_here
from megabagel_kernels.attention.triton import plan_triton, triton_attention
from torch import Tensor

from gpu_suite_parts.packs import fill, rows_of, t2i_1024, tiny
from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.setting import Setting, prepare
from gpu_suite_parts.timing import forward_and_backward

Call = tuple[Configs, torch.dtype, int]

AT_ONCE = 8

OTHERS: dict[str, tuple[Config, ...]] = {
    "forward": (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    "dq": (Config(128, 128, 8, 2), Config(64, 64, 4, 2)),
    "dkv": (Config(32, 128, 8, 3), Config(64, 64, 8, 2)),
}
"""Configurations for Hopper that compile without spills in loops and are not in the table: should one of them be?"""


def run(setting: Setting, report: Report) -> None:
    """Compile all at once, then time one after the other on the same pack."""
    wanted = candidates(setting)
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}):
        seconds: dict[str, float | str] = {}
        work = partial(compile_all, setting, wanted, seconds)
        if not report.measure("configurations", "all at once", "attention", work):
            return
        for name, call in wanted.items():
            work = partial(timed, setting, seconds[name], *call)
            ships = not name.startswith("other")  # an alternative may fail, what ships may not
            report.measure("configurations", name, "attention", work, ours=ships)


def compile_all(setting: Setting, wanted: dict[str, Call], seconds: dict[str, float | str]) -> Result:
    """Fill `seconds` with the time that each takes to compile, or its error."""
    start, context = time.perf_counter(), get_context("spawn")
    with ProcessPoolExecutor(setting.pick(AT_ONCE, 1), mp_context=context, max_tasks_per_child=1) as pool:
        waiting = {name: pool.submit(first_call, setting.toy, *call) for name, call in wanted.items()}
        for name, future in waiting.items():
            error = future.exception()
            seconds[name] = f"{type(error).__name__}: {error}"[:200] if error else future.result()
    return {"compile_s": time.perf_counter() - start}


def candidates(setting: Setting) -> dict[str, Call]:
    """What ships for this device, by dtype and head dim; on Hopper also `OTHERS`, one kernel changed at a time."""
    bf16 = torch.bfloat16
    if setting.toy:
        with_descriptors = replace(INTERPRETER, descriptors=True)
        return {"bfloat16 H=72": (INTERPRETER, bf16, 72), "other descriptors": (with_descriptors, bf16, 64)}
    calls = [(bf16, 128), (bf16, 64), (bf16, 72), (torch.float16, 128), (torch.float32, 128)]
    found = {f"{str(x).removeprefix('torch.')} H={dim}": (configs_here(x, dim), x, dim) for x, dim in calls}
    if torch.cuda.get_device_capability()[0] == 9:
        table = configs_here(bf16, 128)
        for kernel, configs in OTHERS.items():
            for config in configs:
                name = f"other {kernel} {config.rows}x{config.cols} warps {config.warps} stages {config.stages}"
                found[name] = replace(table, **{kernel: config}), bf16, 128
    return found


def first_call(toy: bool, configs: Configs, dtype: torch.dtype, head_dim: int) -> float:
    """Seconds of the first forward and backward of a process, which compile all four kernels."""
    setting = prepare(toy)
    attend, qkv = call_of(setting, setting.pick(512, 60), configs, dtype, head_dim)
    start = time.perf_counter()
    attend(*(x.requires_grad_() for x in qkv)).sum().backward()
    if not toy:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def call_of(
    setting: Setting, tokens: int, configs: Configs, dtype: torch.dtype, head_dim: int
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Attention of 28/4 heads on text to image, and its arguments."""
    heads, kv_heads = setting.pick((28, 4), (2, 1))
    plan = plan_triton(rows_of(fill(setting.pick(t2i_1024, tiny), tokens)).ranges, configs).to(setting.device)
    qkv = [setting.normal(tokens, n, head_dim, key=f"timed {n}", dtype=dtype) for n in (heads, kv_heads, kv_heads)]
    return lambda q, k, v: triton_attention(q, k, v, plan), qkv


def timed(setting: Setting, found: float | str, configs: Configs, dtype: torch.dtype, head_dim: int) -> Result:
    """Compile seconds and run times of 8K tokens."""
    if isinstance(found, str):
        raise RuntimeError(found)
    return {"compile_s": found} | forward_and_backward(
        setting, *call_of(setting, setting.pick(8192, 60), configs, dtype, head_dim)
    )

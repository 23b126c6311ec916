"""Times and memory of operations on the device."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_suite_parts.setting import Setting

WARM_UP, FEWEST, MOST = 3, 5, 50
BUDGET_MS = 400.0
"""Repeats stop when they have taken this long together, but not before there are a few."""

CACHE_BYTES = 2**28
"""More than the second-level cache of any chip: written before each repeat, so that none finds its inputs there."""


def median_ms(setting: Setting, run: Callable[[], object]) -> float:
    """Median milliseconds of a call; in a toy, those of one call by the clock."""
    if setting.toy:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(WARM_UP):
        run()
    evict = torch.empty(CACHE_BYTES, dtype=torch.int8, device=setting.device)
    times: list[float] = []
    while len(times) < FEWEST or (sum(times) < BUDGET_MS and len(times) < MOST):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        evict.zero_()  # it also keeps the device busy while the host prepares the launch
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def forward_and_backward(
    setting: Setting, function: Callable[..., Any], leaves: Sequence[Tensor], backward: bool = True
) -> dict[str, float]:
    """forward_ms and backward_ms of a function of `leaves`, and the most memory that both together need (GiB)."""
    leaves = [leaf.detach().requires_grad_(backward) for leaf in leaves]

    found = {"forward_ms": median_ms(setting, lambda: function(*leaves))}
    if not backward:
        return found
    if not setting.toy:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    result = function(*leaves)
    outs = [result] if isinstance(result, Tensor) else [*result]
    grads = [setting.normal(*out.shape, key=f"upstream {i}", dtype=out.dtype) for i, out in enumerate(outs)]
    backwards = partial(torch.autograd.grad, outs, leaves, grads, retain_graph=True)
    backwards()
    peak = {} if setting.toy else {"peak_gib": (torch.cuda.max_memory_allocated() - held) / 2**30}
    return found | {"backward_ms": median_ms(setting, backwards)} | peak

"""Attention against its rivals: the same packs, the same numbers, one script.

TFLOP/s count four times head dim per visible pair and head forward and 2.5 times that backward; `visited` counts the
pairs inside the blocks that a kernel computes.
"""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gpu_suite_parts.check_attention import HEADS
from gpu_suite_parts.packs import TIMED, Rows, fill, rows_of, tiny
from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.rivals import Rival, dense_by_sample, flex_as_bagel, flex_with_our_lists, ours
from gpu_suite_parts.setting import Setting
from gpu_suite_parts.timing import forward_and_backward
from megabagel.sequence.pack import Pack

LENGTHS = (36_864, 8192)
HEAD_DIM = 128
LAYERS = 28
"""Of the 7B model: what share of a mask made once per step one layer bears."""

SAME = 0.02
"""Largest relative difference of two ways to compute the same in bf16."""

Make = Callable[[Setting, Rows, int, int], Rival]
RIVALS: dict[str, Make] = {
    "flex, our lists": flex_with_our_lists,
    "flex as BAGEL": flex_as_bagel,
    "SDPA by sample": dense_by_sample,
}


def run(setting: Setting, report: Report) -> None:
    """All packs by all engines; those of the full 7B shape come first, in case the time runs out."""
    kinds = setting.pick(TIMED, {"tiny": tiny})
    lengths, all_heads = setting.pick((LENGTHS, HEADS), ((90,), ((2, 1),)))
    for tokens, heads, kind in itertools.product(lengths, all_heads, kinds):
        compare(setting, report, f"{tokens} {heads[0]}/{heads[1]} {kind}", partial(fill, kinds[kind], tokens), heads)


def compare(setting: Setting, report: Report, name: str, make_pack: Callable[[], Pack], heads: tuple[int, int]) -> None:
    """One pack by every engine, ours first."""
    if "attention" in report.broken:
        report.measure("attention", name, "attention", dict)  # notes that it is skipped
        return
    rows = rows_of(make_pack())
    qkv = numbers(setting, rows.ranges.queries, heads)
    work = partial(measure, setting, report, rows, qkv, ours)
    mine = report.measure("attention", f"{name}: ours", "attention", work)
    for rival, make in RIVALS.items():
        work = partial(measure, setting, report, rows, qkv, make, mine)
        report.measure("attention", f"{name}: {rival}", "a rival", work, ours=False)


def numbers(setting: Setting, tokens: int, heads: tuple[int, int]) -> list[Tensor]:
    """q, k, v in the order [und | gen]."""
    counts = {"q": heads[0], "k": heads[1], "v": heads[1]}
    return [setting.normal(tokens, count, HEAD_DIM, key=f"bench {name}") for name, count in counts.items()]


def measure(
    setting: Setting, report: Report, rows: Rows, qkv: list[Tensor], make: Make, mine: Result | None = None
) -> Result:
    """Times, memory and rates of one engine; beside `mine`, how many times faster ours is."""
    rival = make(setting, rows, qkv[0].shape[1], HEAD_DIM)
    found: Result = {} if rival.mask_ms == 0 else {"mask_ms": rival.mask_ms}
    place = torch.from_numpy(np.argsort(rows.token_S)).to(setting.device)
    inputs = [x[place] for x in qkv] if rival.in_sequence else qkv
    found |= forward_and_backward(setting, rival.attend, inputs, rival.backward)
    found |= rival.notes
    if mine:
        found["differs"] = difference(setting, rows, qkv, rival, inputs)
    if setting.toy:
        return found
    found |= rates(report, rows, qkv[0], rival, found)
    if mine:
        layer = [x["forward_ms"] + x["backward_ms"] for x in (found, mine)]
        found["ours_faster"] = (layer[0] + rival.mask_ms / LAYERS) / layer[1]
        found["ours_faster_one_layer"] = (layer[0] + rival.mask_ms) / layer[1]
    torch.cuda.empty_cache()
    return found


def difference(setting: Setting, rows: Rows, qkv: list[Tensor], rival: Rival, inputs: list[Tensor]) -> float:
    """Norm of a rival's output minus ours, over that of ours; ValueError if it computes something else."""
    mine = ours(setting, rows, qkv[0].shape[1], HEAD_DIM).attend(*qkv).float()
    # As in the timed call: inputs without gradients would make a compiled rival compile once more.
    theirs = rival.attend(*(x.detach().requires_grad_(rival.backward) for x in inputs)).detach().float()
    if rival.in_sequence:
        theirs = theirs[torch.from_numpy(rows.token_S).to(setting.device)]
    differs = float((theirs - mine).norm() / mine.norm())
    if not differs <= SAME:
        raise ValueError(f"its output differs from ours by {differs:.2g}, expected at most {SAME}: no comparison")
    return differs


def rates(report: Report, rows: Rows, q: Tensor, rival: Rival, found: Result) -> Result:
    """TFLOP/s on visible and visited pairs, and the share of what plain matrix products reach."""
    per_pair = 4 * HEAD_DIM * q.shape[1]
    visible = per_pair * int(rows.pack.visible_S.sum())
    result: Result = {"forward_tflops": visible / found["forward_ms"] / 1e9}
    result["backward_tflops"] = 2.5 * visible / found["backward_ms"] / 1e9
    if rival.visited is not None:
        result["visited_tflops"] = per_pair * rival.visited / found["forward_ms"] / 1e9
        result["visible_of_visited"] = visible / per_pair / rival.visited
    gemm = report.ceiling("gemm", "tflops")
    if gemm is not None:
        result |= {f"{way}_of_gemm": result[f"{way}_tflops"] / gemm for way in ("forward", "backward")}
    return result

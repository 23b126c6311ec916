"""How sparse attention is on BAGEL's packs, how much of it a block schedule keeps, and what making the plan costs.

For packs of each kind at pretraining length: the visible share of the S x S square, the share that 128 x 128 blocks
visit (in sequence order, and in the [und | gen] layout that the model runs in), and the median time to plan attention
for forward and backward. Beside it, on a shorter pack in the same process, torch's create_block_mask with one mask per
head, as the released trainer makes it at every step. Numbers go to the terminal, and to a JSON file with --out.

    python benchmarks/attention_plan.py
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megabagel_kernels.attention.configs import configs_for
from megabagel_kernels.attention.mask import AttentionRanges, visible_pairs
from megabagel_kernels.attention.schedule import PARTIAL, classify, visited_pairs
from megabagel_kernels.attention.triton import plan_triton
from torch.nn.attention.flex_attention import create_block_mask

from megabagel.sequence.layout import build_layout, layout_rows

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from gpu_suite_parts.packs import KINDS, fill

TOKENS, SHORT, HEADS, BLOCK, CHUNK = 36_864, 8_192, 28, 128, 128


def seconds(run: Callable[[], object], runs: int) -> float:
    """Median CPU time: all of it is one thread's, and other programs on the machine do not count."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(name: str, packs: int) -> dict[str, float]:
    """Means over several packs of one kind."""
    rows = []
    for number in range(packs):
        pack = fill(KINDS[name], TOKENS, number)
        layout = build_layout(pack, layout_rows(TOKENS, CHUNK, 1), CHUNK, 1)
        ranges = layout.codes(pack, 0)
        visible, square = visible_pairs(pack.codes), pack.tokens**2
        sequence, rank = (classify(c, BLOCK, BLOCK) for c in (pack.codes, ranges))
        visited = visited_pairs(sequence, BLOCK, BLOCK)
        rows.append(
            {
                "samples": len(pack.samples),
                "visible": visible / square,
                "visited": visited / square,
                "useful": visible / visited,
                "partial_blocks": float((sequence == PARTIAL).sum() / (sequence > 0).sum()),
                "layout_extra": visited_pairs(rank, BLOCK, BLOCK) / visited - 1,
                "plan_ms": 1e3 * seconds(lambda ranges=ranges: plan_triton(ranges, CONFIGS), 3),
            }
        )
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


CONFIGS = configs_for("3.7.1", 90, torch.bfloat16, 128)


def rival(runs: int) -> dict[str, float]:
    """Our plan and torch's block mask with a mask per head, for one short pack."""
    pack = fill(KINDS["pretraining mix"], SHORT)
    ours = 1e3 * seconds(lambda: plan_triton(pack.codes, CONFIGS), runs)
    theirs = 1e3 * seconds(lambda: block_mask(pack.codes), runs)
    return {"tokens": pack.tokens, "plan_ms": ours, "create_block_mask_ms": theirs, "ratio": theirs / ours}


def block_mask(ranges: AttentionRanges) -> object:
    """The mask for every head, as the released trainer asks for it."""
    code_S, a0, a1, b0, b1 = (torch.from_numpy(x) for x in (ranges.key_code, *ranges.of_queries))

    def visible(_batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        code = code_S[k]
        return ((a0[q] <= code) & (code < a1[q])) | ((b0[q] <= code) & (code < b1[q]))

    return create_block_mask(visible, B=1, H=HEADS, Q_LEN=ranges.queries, KV_LEN=ranges.keys, device="cpu")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=3, help="packs of each kind")
    parser.add_argument("--out", type=Path, help="write a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"torch": torch.__version__, "tokens": TOKENS, "kinds": {}}
    print("| pack | samples | visible | visited 128x128 | visible / visited | partial | [und|gen] | plan |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in KINDS:
        row = result["kinds"][name] = measure(name, arguments.packs)
        print(
            f"| {name} | {row['samples']:.0f} | {row['visible']:.1%} | {row['visited']:.1%} | {row['useful']:.2f} "
            f"| {row['partial_blocks']:.0%} | {row['layout_extra']:+.1%} | {row['plan_ms']:.0f} ms |"
        )
    found = result["rival"] = rival(3)
    print(
        f"{found['tokens']} tokens: plan {found['plan_ms']:.1f} ms, create_block_mask with {HEADS} heads "
        f"{found['create_block_mask_ms']:.0f} ms ({found['ratio']:.0f} times); mask integers: 20 bytes per token"
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megabagel_kernels.attention.configs import configs_for
from megabagel_kernels.attention.mask import AttentionCodes, visible_pairs
from megabagel_kernels.attention.schedule import PARTIAL, classify, visited_pairs
from megabagel_kernels.attention.triton_engine import plan_triton
from torch.nn.attention.flex_attention import create_block_mask

from megabagel.sequence.items import Clip, Item, Latent, Text, Vit, item_tokens
from megabagel.sequence.keys import SampleKey, generator
from megabagel.sequence.layout import build_layout, layout_rows
from megabagel.sequence.pack import Pack, build_pack
from megabagel.sequence.sample import Dropout, plan_sample

TOKENS, SHORT, HEADS, BLOCK, CHUNK = 36_864, 8_192, 28, 128, 128
Draw = np.random.Generator


def _side(draw: Draw, low: int, high: int, stride: int) -> tuple[int, int]:
    """Rows and columns of an image of some aspect whose long side lies in [low, high] pixels."""
    long, ratio = draw.integers(low, high + 1), draw.choice([1, 1, 3 / 4, 9 / 16])
    sides = int(long // stride), int(long * ratio // stride)
    return sides if draw.random() < 0.5 else sides[::-1]


def _latent(draw: Draw, low: int, high: int, noised: bool, slot: int) -> Latent:
    return Latent(slot, *_side(draw, low, high, 16), noised=noised)


def t2i(draw: Draw) -> list[Item]:
    """A caption and a generated image of 512 to 1024 pixels."""
    return [Text(0, int(draw.integers(40, 300))), _latent(draw, 512, 1024, True, 1)]


def t2i_large(draw: Draw) -> list[Item]:
    """A caption and an image of 1024 x 1024 pixels."""
    return [Text(0, int(draw.integers(40, 300))), Latent(1, 64, 64, noised=True)]


def edit(draw: Draw) -> list[Item]:
    """Source image twice, instruction, target."""
    clean = _latent(draw, 512, 1024, False, 0)
    seen = Vit(0, *_side(draw, 378, 980, 14))
    return [clean, seen, Text(1, int(draw.integers(20, 120))), Latent(2, clean.rows, clean.cols, noised=True)]


def vlm(draw: Draw) -> list[Item]:
    """One to four images and a conversation."""
    seen: list[Item] = [Vit(n, *_side(draw, 378, 980, 14)) for n in range(draw.choice([1, 1, 2, 4]))]
    return [*seen, Text(9, int(draw.integers(60, 1200)), loss=True)]


def text(draw: Draw) -> list[Item]:
    """A document."""
    return [Text(0, int(draw.integers(200, 8000)), loss=True)]


def interleaved(draw: Draw) -> list[Item]:
    """Texts and images in turn, each image noised, then clean, then seen."""
    items: list[Item] = []
    for slot in range(int(draw.integers(3, 8))):
        noised = _latent(draw, 256, 512, True, slot)
        clean = Latent(slot, noised.rows, noised.cols, noised=False)
        items += [
            Text(slot, int(draw.integers(30, 200)), loss=True),
            noised,
            clean,
            Vit(slot, *_side(draw, 224, 378, 14)),
        ]
    return items[:-2]


def forcing(draw: Draw) -> list[Item]:
    """A clip in groups of diffusion forcing."""
    frames = [Latent(slot, 32, 32, noised=True) for slot in range(int(draw.integers(3, 8)))]
    return [Text(9, int(draw.integers(30, 200))), *(Clip((frame,), (1,), chain=0) for frame in frames)]


Kind = Callable[[Draw], list[Item]]
PACKS: dict[str, tuple[tuple[Kind, float], ...]] = {
    "T2I 1024 x 1024": ((t2i_large, 1),),
    "T2I, mixed sizes": ((t2i, 1),),
    "editing": ((edit, 1),),
    "interleaved": ((interleaved, 1),),
    "diffusion forcing": ((forcing, 1),),
    "VLM": ((vlm, 1),),
    "text": ((text, 1),),
    "pretraining mix": ((t2i, 0.6), (vlm, 0.2), (interleaved, 0.1), (edit, 0.05), (text, 0.05)),
}


def draw_pack(name: str, tokens: int, number: int) -> Pack:
    """Samples of a kind until no more fits."""
    kinds, weights = zip(*PACKS[name], strict=True)
    draw, plans, left, misses = generator("attention plan", name, number), [], tokens, 0
    while misses < 20:
        items = kinds[int(draw.choice(len(kinds), p=np.array(weights)))](draw)
        if sum(map(item_tokens, items)) > left:
            misses += 1
            continue
        plans.append(plan_sample(items, SampleKey(0, name, len(plans), number), Dropout()))
        left -= plans[-1].tokens
    return build_pack(plans)


def seconds(run: Callable[[], object], runs: int) -> float:
    """Median."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str, packs: int) -> dict[str, float]:
    """Means over several packs of one kind."""
    rows = []
    for number in range(packs):
        pack = draw_pack(name, TOKENS, number)
        layout = build_layout(pack, layout_rows(TOKENS, CHUNK, 1), CHUNK, 1)
        codes = layout.codes(pack, 0)
        visible, square = visible_pairs(pack.codes), pack.tokens**2
        sequence, rank = (classify(c, BLOCK, BLOCK) for c in (pack.codes, codes))
        visited = visited_pairs(sequence, BLOCK, BLOCK)
        rows.append(
            {
                "samples": len(pack.samples),
                "visible": visible / square,
                "visited": visited / square,
                "useful": visible / visited,
                "partial_blocks": float((sequence == PARTIAL).sum() / (sequence > 0).sum()),
                "layout_extra": visited_pairs(rank, BLOCK, BLOCK) / visited - 1,
                "plan_ms": 1e3 * seconds(lambda codes=codes: plan_triton(codes, CONFIGS), 3),
            }
        )
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


CONFIGS = configs_for("3.7.1", 90, torch.bfloat16, 128)


def rival(runs: int) -> dict[str, float]:
    """Our plan and torch's block mask with a mask per head, for one short pack."""
    pack = draw_pack("pretraining mix", SHORT, 0)
    ours = 1e3 * seconds(lambda: plan_triton(pack.codes, CONFIGS), runs)
    theirs = 1e3 * seconds(lambda: block_mask(pack.codes), runs)
    return {"tokens": pack.tokens, "plan_ms": ours, "create_block_mask_ms": theirs, "ratio": theirs / ours}


def block_mask(codes: AttentionCodes) -> object:
    """The mask for every head, as the released trainer asks for it."""
    code_S, *bounds = (torch.from_numpy(x) for x in (codes.key_code, codes.a0, codes.a1, codes.b0, codes.b1))
    a0, a1, b0, b1 = bounds

    def visible(_batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        code = code_S[k]
        return ((a0[q] <= code) & (code < a1[q])) | ((b0[q] <= code) & (code < b1[q]))

    return create_block_mask(visible, B=1, H=HEADS, Q_LEN=codes.queries, KV_LEN=codes.keys, device="cpu")


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
    for name in PACKS:
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

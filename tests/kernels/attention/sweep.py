"""Worst errors of the kernels over many random packings.

    TRITON_INTERPRET=1 python -m tests.kernels.attention.sweep --packings 300

prints, per dtype, the worst error of each result against fp64, that of plain torch in the same dtype, and the largest
ratio of the first to twice the second (or to twice one rounding, where plain torch is lucky). bf16 and fp16 pass with
ratios below 1, fp32 with errors below 1e-6.
"""

import argparse
import time

import torch

from tests.kernels.attention.cases import NAMES, by_plain_torch, by_reference, by_triton, errors, random_case
from tests.kernels.triton import bf16_shim


def sweep(dtype: torch.dtype, packings: int, first: int) -> None:
    """Print the table of one dtype."""
    worst, plain_worst, ratio = (dict.fromkeys(NAMES, 0.0) for _ in range(3))
    start = time.perf_counter()
    for seed in range(first, first + packings):
        case = random_case(seed)
        expected = by_reference(case, dtype)
        found = errors(by_triton(case, dtype), expected)
        plain = errors(by_plain_torch(case, dtype), expected)
        for name in NAMES:
            worst[name] = max(worst[name], found[name])
            plain_worst[name] = max(plain_worst[name], plain[name])
            ratio[name] = max(ratio[name], found[name] / (2 * max(plain[name], torch.finfo(dtype).eps / 2)))
    print(f"{dtype}, {packings} packings, {time.perf_counter() - start:.0f} s")
    for title, row in (("kernels", worst), ("plain torch", plain_worst), ("ratio", ratio)):
        print(f"  {title:12}", "  ".join(f"{name} {row[name]:.1e}" for name in NAMES), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--packings", type=int, default=300)
    parser.add_argument("--first", type=int, default=1000, help="first seed")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    bf16_shim.install()
    torch.set_num_threads(1)
    for name in arguments.dtypes:
        sweep(getattr(torch, name), arguments.packings, arguments.first)

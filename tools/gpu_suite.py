"""Check every kernel on one GPU, then time it beside its rivals: `python tools/gpu_suite.py --out DIR`.

Needs one GPU, torch and Triton; no more than this repository on the path. Parts, in order (`--only` picks some):

    ceilings         a large product, a copy, unmasked attention: what the chip can do
    check-attention  attention against its dense definition in fp64
    check-others     the other kernels against their references; no benchmark of a kernel that fails will run
    configurations   seconds to compile each attention configuration, and how fast it runs
    attention        ours, FlexAttention fed with our block lists and as BAGEL uses it, and SDPA sample by sample
    memory           bandwidth of the memory-bound kernels beside that of a copy
    liger            Liger's norm, rotation, SwiGLU and linear + cross-entropy beside ours, where it is installed
    layer            one whole layer of the 7B model, forward and backward, and its MFU

Writes DIR/gpu_suite_<date>.json and .md after every item, so that stopping loses nothing; `--minutes` stops between
items. Shares of a ceiling need the ceilings in the same run. Exit code 1: a kernel is wrong or does not run. Results
that are kept lie in benchmarks/results.

`--toy` (also where there is no GPU and TRITON_INTERPRET=1 is set) goes through all parts at toy sizes on the CPU, in
Triton's interpreter: a test of this program and of values, its times mean nothing.
"""

import argparse
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

PARTS = ("ceilings", "check-attention", "check-others", "configurations", "attention", "memory", "liger", "layer")


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help="parts to run")
    parser.add_argument("--minutes", type=float, default=25, help="start nothing later (default: %(default)s)")
    parser.add_argument("--toy", action="store_true", help="toy sizes in the interpreter")
    chosen = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    toy = chosen.toy or (not gpu and os.environ.get("TRITON_INTERPRET") == "1")
    if not toy and not gpu:
        parser.error("torch finds no GPU; --toy runs all parts at toy sizes in Triton's interpreter")
    if not toy and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted; unset it, or pass --toy")
    return run(chosen.out, [part for part in PARTS if part in chosen.only], chosen.minutes, toy)


def run(folder: Path, parts: list[str], minutes: float, toy: bool) -> int:
    """Run parts in order; 1 if a kernel of ours is wrong or does not run."""
    if toy:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite checks the cases of tests/kernels
    # Not before this: Triton decides when it is imported whether its functions compile or are interpreted.
    from gpu_suite_parts import attention, ceilings, check_attention, check_others, compiling, layer, liger, memory
    from gpu_suite_parts.report import Report
    from gpu_suite_parts.setting import environment, prepare

    setting = prepare(toy)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d_%H%M%S")
    report = Report(folder / f"gpu_suite_{now}", environment(setting), minutes)
    runs = {
        "ceilings": ceilings.run,
        "check-attention": check_attention.run,
        "check-others": check_others.run,
        "configurations": compiling.run,
        "attention": attention.run,
        "memory": memory.run,
        "liger": liger.run,
        "layer": layer.run,
    }
    for part in parts:
        runs[part](setting, report)
    print(f"{report.path}.md: {len(report.failures)} failures, {len(report.left_out)} items left out")
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())

"""Plants errors in the kernels and the schedule, one at a time, and checks that the tests catch each.

    python -m tests.kernels.triton.mutations [--only NAME]

Works on a copy of the package, so the sources stay as they are. Exits with 1 if an error goes unnoticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import megabagel_kernels

PACKAGE = Path(megabagel_kernels.__file__).parent
REPOSITORY = Path(__file__).parents[3]
FORWARD, BACKWARD = "triton_kernels.py", "triton_kernels_backward.py"
OPS, ENGINE, SCHEDULE = "triton_engine_ops.py", "triton_engine.py", "schedule.py"
VALUES = "tests/kernels/triton/interpreted_attention.py"
BLOCKS = "tests/kernels/test_schedule.py"


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` everywhere in `file`; some of `tests` have to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = (VALUES,)


MUTATIONS = [
    Mutation("interval closed at its end", FORWARD, "(code < a1)", "(code <= a1)"),
    Mutation("private interval open at its start", FORWARD, "(b0 <= code)", "(b0 < code)"),
    Mutation("padding keys get code 0", ENGINE, "_padded(codes.key_code, PADDING)", "_padded(codes.key_code, 0)"),
    Mutation("no guard for rows that saw nothing", FORWARD, "tl.where(new_peak == -INFINITY, 0.0, new_peak)",
             "new_peak"),
    Mutation("no guard for an empty sum", FORWARD, "tl.where(saw, total, 1.0)", "total"),
    Mutation("output not rescaled to the new peak", FORWARD, "v, out * shrink[:, None]", "v, out"),
    Mutation("sum not rescaled to the new peak", FORWARD, "total * shrink", "total"),
    Mutation("lse left in base 2", FORWARD, "(peak + tl.math.log2(divisor)) * LN_2", "peak + tl.math.log2(divisor)"),
    Mutation("backward takes lse as base 2", FORWARD, "lse * LOG2_E", "lse"),
    Mutation("gradient counts where nothing is seen", FORWARD, "tl.where(lse == -INFINITY, 0.0, delta)", "delta"),
    Mutation("gradient of lse forgotten", FORWARD, "delta -= ", "delta -= 0 * "),
    Mutation("gradient of lse with the wrong sign", FORWARD, "delta -= ", "delta += "),
    Mutation("delta forgotten in dq", BACKWARD, "(dweight - delta[:, None])", "dweight"),
    Mutation("delta forgotten in dk", BACKWARD, "(dweight - delta[None, :])", "dweight"),
    Mutation("head steps one block late", BACKWARD, "next_place + 1 == stop", "next_place == stop"),
    Mutation("dk and dv of the first head only", BACKWARD, "tl.where(wraps, next_head + 1, next_head)", "next_head"),
    Mutation("key head of the wrong group", FORWARD, "head // GROUP", "head % (N // GROUP)"),
    Mutation("no row mask when loading", FORWARD, "mask=inside, other=0.0", "mask=inside | True, other=0.0"),
    Mutation("no row mask when storing", FORWARD, "tl.store(to, tile.to(X.dtype.element_ty), mask=inside)",
             "tl.store(to, tile.to(X.dtype.element_ty))"),
    Mutation("no column mask for padded head dims", FORWARD, "if HP != H:", "if False:"),
    Mutation("dk not scaled", BACKWARD, "dk * scale", "dk"),
    Mutation("parts of dk and dv kept in low precision", OPS, "torch.float32 if split", "k.dtype if split"),
    Mutation("key stride used for values", FORWARD, "S, v_stride, COLS", "S, H, COLS"),
    Mutation("next block read too late", FORWARD, "tl.load(BLOCKS + place + 1)", "tl.load(BLOCKS + place)"),
    Mutation("blocks cut short are full", SCHEDULE, "kinds[:, -1] = np.minimum(kinds[:, -1], PARTIAL)", "pass",
             (BLOCKS, VALUES)),
    Mutation("partial blocks without mask", SCHEDULE, "full, partial = kinds == FULL, kinds == PARTIAL",
             "full, partial = kinds != EMPTY, kinds > FULL", (BLOCKS, VALUES)),
    Mutation("pieces across a change of samples", SCHEDULE, "[codes.a0, codes.b0, codes.b1]", "[codes.b0, codes.b1]",
             (BLOCKS,)),
    Mutation("pieces across a jump of codes", SCHEDULE, "cut[1:] |= (step != 0) & (step != 1)", "pass", (BLOCKS,)),
]  # fmt: skip


def is_caught(mutation: Mutation, folder: Path) -> bool:
    """Whether the tests fail on a copy of the package with the error in it."""
    copy = folder / "megabagel_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "attention" / mutation.file
    source = path.read_text()
    assert mutation.old in source, f"{mutation.name}: {mutation.file} does not contain {mutation.old!r}"
    path.write_text(source.replace(mutation.old, mutation.new))
    environment = os.environ | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    failed_tests = done.returncode == 1
    crashed = done.returncode < 0
    assert failed_tests or crashed or done.returncode == 0, done.stdout + done.stderr
    return failed_tests or crashed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="mutations whose name contains this")
    only = parser.parse_args().only
    missed = 0
    for mutation in MUTATIONS:
        if only in mutation.name:
            with tempfile.TemporaryDirectory() as folder:
                caught = is_caught(mutation, Path(folder))
            print("caught" if caught else "MISSED", mutation.name, sep="  ", flush=True)
            missed += not caught
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

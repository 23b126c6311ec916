"""Plants errors in the kernels and the schedule, one at a time, and checks that the tests catch each.

    python -m tests.kernels.triton.mutations [--only WORDS]

Plants those whose name or file contains WORDS, or all. Works on a copy of the package, so the sources stay as they are.
Exits with 1 if an error goes unnoticed.
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
FORWARD, BACKWARD, OPS, ENGINE, SCHEDULE = (
    f"attention/{name}.py" for name in ("triton_forward", "triton_backward", "triton_ops", "triton", "schedule")
)
FLOW, NORM, ROPE, SWIGLU = (f"{op}/triton.py" for op in ("flow", "rms_norm", "qk_norm_rope", "swiglu"))
ROUNDING, PHILOX = "rounding.py", "philox.py"
SLICES, PASSES = "linear_cross_entropy/slices.py", "linear_cross_entropy/triton.py"
VALUES, FLOWS, NORMS, ROPES, SWIGLUS, ENTROPIES = (
    f"tests/kernels/{op}/interpreted.py"
    for op in ("attention", "flow", "rms_norm", "qk_norm_rope", "swiglu", "linear_cross_entropy")
)
BLOCKS, DRAWS = "tests/kernels/attention/test_schedule.py", "tests/kernels/test_philox.py"


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` everywhere in `file` of the package; some of `tests` have to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = (VALUES,)


ATTENTION = [
    Mutation("interval closed at its end", FORWARD, "(code < a1)", "(code <= a1)"),
    Mutation("private interval open at its start", FORWARD, "(b0 <= code)", "(b0 < code)"),
    Mutation("padding keys get code 0", ENGINE, "_padded(ranges.key_code, PADDING)", "_padded(ranges.key_code, 0)"),
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
    Mutation("pieces across a change of samples", SCHEDULE, "[ranges.public_start, ranges.private_start,",
             "[ranges.private_start,", (BLOCKS,)),
    Mutation("pieces across a jump of codes", SCHEDULE, "cut[1:] |= (step != 0) & (step != 1)", "pass", (BLOCKS,)),
]  # fmt: skip

NOISE_AND_FLOW_LOSS = [
    Mutation("channels slowest in a patch", FLOW, "feature % CHANNELS, feature // CHANNELS",
             "feature // (PATCH * PATCH), feature % (PATCH * PATCH)", (FLOWS,)),
    Mutation("patches numbered down the columns", FLOW, "patches = width // PATCH", "patches = height // PATCH",
             (FLOWS,)),
    Mutation("noise numbered by the row of the pack", FLOW, "tl.load(SEED + image)[:, None], patch_index[:, None]",
             "tl.load(SEED + image)[:, None], g[:, None]", (FLOWS,)),
    Mutation("noise numbered by the padded width", FLOW, "patch_index[:, None] * Z + feature",
             "patch_index[:, None] * ZP + feature", (FLOWS,)),
    Mutation("seed of the loss cut to 32 bits", FLOW, "tl.randn(seed[:, None]", "tl.randn(seed.to(tl.int32)[:, None]",
             (FLOWS,)),
    Mutation("timestep on the wrong side", FLOW, "(1.0 - time)[:, None] * x0 + time[:, None] * eps",
             "time[:, None] * x0 + (1.0 - time)[:, None] * eps", (FLOWS,)),
    Mutation("target with the wrong sign", FLOW, "eps - x0, 0.0", "x0 - eps, 0.0", (FLOWS,)),
    Mutation("infinite latents are real", FLOW, 'tl.abs(x0) < float("inf")', "x0 == x0", (FLOWS,)),
    Mutation("loss is a mean over padded columns", FLOW, "tl.sum(error * error, 1) / Z",
             "tl.sum(error * error, 1) / ZP", (FLOWS,)),
    Mutation("weight lost in the gradient", FLOW, "gradient = error * weight[:, None]", "gradient = error", (FLOWS,)),
    Mutation("gradient of the square without its 2", FLOW, "(2.0 / Z)", "(1.0 / Z)", (FLOWS,)),
    Mutation("reference term has no gradient", FLOW, "gradient += error * weight[:, None]", "pass", (FLOWS,)),
    Mutation("reference term takes the flow's weight", FLOW, "weight = tl.load(REF_WEIGHT + g, mask=inside, other=0.0)",
             "pass", (FLOWS,)),
    Mutation("logged loss carries the weight", FLOW, "tl.store(MSE + g, mse,", "tl.store(MSE + g, mse * weight,",
             (FLOWS,)),
    Mutation("stride of v used for the target", FLOW, "g[:, None] * target_stride", "g[:, None] * v_stride", (FLOWS,)),
    Mutation("upstream gradient of the losses ignored", FLOW, "(gradient_GZ * dtotal_G[:, None])", "gradient_GZ",
             (FLOWS,)),
    Mutation("gradient of the losses kept in low precision", FLOW, "features, dtype=torch.float32)\n    return total_G",
             "features)\n    return total_G", (FLOWS,)),
    Mutation("Philox of seven rounds", PHILOX, "_ROUNDS = 10", "_ROUNDS = 7", (DRAWS,)),
    Mutation("high half of a draw's number dropped", PHILOX, "counter >> 32, zero, zero", "zero, zero, zero", (DRAWS,)),
]  # fmt: skip

NORM_ROPE_SWIGLU = [
    Mutation("norm forgets eps in backward", NORM, "/ D + eps)\n        normed", "/ D)\n        normed", (NORMS,)),
    Mutation("norm is a mean over padded columns", NORM, "tl.sum(x * x, 0) / D", "tl.sum(x * x, 0) / DP", (NORMS,)),
    Mutation("norm of the sum before it is rounded", NORM, "x = round_like(x, SUM)", "pass", (NORMS,)),
    Mutation("norm not rounded before gamma", ROUNDING, "x.to(LIKE.dtype.element_ty).to(tl.float32)", "x",
             (NORMS, ROPES, SWIGLUS)),
    Mutation("last program of backward runs beyond the rows", NORM, "tl.minimum(program * ROWS + ROWS, T)",
             "program * ROWS + ROWS", (NORMS,)),
    Mutation("stride of x used for the residual", NORM, "row * residual_stride", "row * x_stride", (NORMS,)),
    Mutation("gradient of the residual path forgotten", NORM, "HAS_DSUM=dsum_TD is not None", "HAS_DSUM=False",
             (NORMS,)),
    Mutation("gradient of the norm's scale forgotten", NORM, " - normed * (tl.sum(dnormed * normed, 0) / D))", ")",
             (NORMS,)),
    Mutation("gradient of gamma has gamma in it", NORM, "dgamma += dnormed * normed\n        dnormed *= gamma",
             "dnormed *= gamma\n        dgamma += dnormed * normed", (NORMS,)),
    Mutation("partial sums of gamma's gradient in low precision", NORM, "programs, width, dtype=torch.float32)",
             "programs, width)", (NORMS,)),
    Mutation("gamma of the other expert", ROPE, "gen_GNH, gamma_gen_H, cos", "gen_GNH, gamma_und_H, cos", (ROPES,)),
    Mutation("gen rows take the angles of und rows", ROPE, "cos_TH[num_und:], sin_TH[num_und:]",
             "cos_TH, sin_TH", (ROPES,)),
    Mutation("last program of und runs into gen", ROPE, "(rows < T)[:, None] & known", "(rows >= 0)[:, None] & known",
             (ROPES,)),
    Mutation("heads turned the wrong way", ROPE, "first * cos - second * sin, second * cos + first * sin",
             "first * cos + second * sin, second * cos - first * sin", (ROPES,)),
    Mutation("gradient of heads not turned back", ROPE, "dy_first * cos + dy_second * sin",
             "dy_first * cos - dy_second * sin", (ROPES,)),
    Mutation("gamma of the first half for both", ROPE, "GAMMA + R + channels", "GAMMA + channels", (ROPES,)),
    Mutation("angles of the first row for all", ROPE, "rows[:, None] * table_stride", "0 * rows[:, None]", (ROPES,)),
    Mutation("width of the table for its stride", ROPE, "rows[:, None] * table_stride", "rows[:, None] * (2 * R)",
             (ROPES,)),
    Mutation("mean over half a head", ROPE, "square / H + eps", "square / R + eps", (ROPES,)),
    Mutation("gradient of gamma from the last head alone", ROPE, "dgamma_second += d_second",
             "dgamma_second = d_second", (ROPES,)),
    Mutation("gradients of both gammas swapped", ROPE, "return dund_UNH, dgen_GNH, dgamma_und_H, dgamma_gen_H",
             "return dund_UNH, dgen_GNH, dgamma_gen_H, dgamma_und_H", (ROPES,)),
    Mutation("partial sums of head gammas in low precision", ROPE, "programs, width, dtype=torch.float32)",
             "programs, width)", (ROPES,)),
    Mutation("rows of a fused projection taken as contiguous", ROPE, "x_TNH.stride(0),", "heads * width,", (ROPES,)),
    Mutation("derivative of silu cut short", SWIGLU, "sigmoid * (1.0 + gate * (1.0 - sigmoid))", "sigmoid", (SWIGLUS,)),
    Mutation("up read a block after gate", SWIGLU, "stride + F + columns", "stride + COLS + columns", (SWIGLUS,)),
    Mutation("last piece of a wide row skipped", SWIGLU, "triton.cdiv(width, COLS)", "max(1, width // COLS)",
             (SWIGLUS,)),
]  # fmt: skip

CROSS_ENTROPY = [
    Mutation("sum of tokens not rescaled to the new peak", PASSES, "total * tl.exp(peak - new_peak)", "total",
             (ENTROPIES,)),
    Mutation("logits beyond the slice are 0", PASSES, 'other=-float("inf")', "other=0.0", (ENTROPIES,)),
    Mutation("label one past the slice taken for its own", PASSES, "(label < tokens)", "(label <= tokens)",
             (ENTROPIES,)),
    Mutation("label's token has no gradient", PASSES, "(softmax - one_hot)", "softmax", (ENTROPIES,)),
    Mutation("last piece of a slice has no gradient", PASSES, "triton.cdiv(tokens, COLS)", "max(1, tokens // COLS)",
             (ENTROPIES,)),
    Mutation("last slice of the vocabulary skipped", SLICES, "weight_VD.split(tokens):",
             "weight_VD.split(tokens)[: len(weight_VD) // tokens or 1]:", (ENTROPIES,)),
    Mutation("labels not counted from the shard in forward", SLICES, "label_Q - shard.first - start", "label_Q - start",
             (ENTROPIES,)),
    Mutation("labels not counted from the shard in backward", SLICES, "label_Q - ctx.first - start", "label_Q - start",
             (ENTROPIES,)),
    Mutation("labels not counted from the slice", SLICES, "label_Q - ctx.first - start", "label_Q - ctx.first",
             (ENTROPIES,)),
    Mutation("each shard divides by its own sum", SLICES,
             "target_Q = shard.all_sum(torch.stack([(lse_Q - peak_Q).exp(), target_Q]))",
             "target_Q = (lse_Q - peak_Q).exp(), shard.all_sum(target_Q)", (ENTROPIES,)),
    Mutation("ignored rows keep their gradient", SLICES, "torch.where(label_Q == ctx.ignore, 0, dloss_Q)", "dloss_Q",
             (ENTROPIES,)),
    Mutation("gradient of hidden states in low precision", SLICES, "torch.zeros_like(hidden_QD, dtype=lse_Q.dtype)",
             "torch.zeros_like(hidden_QD)", (ENTROPIES,)),
]  # fmt: skip

MUTATIONS = ATTENTION + NOISE_AND_FLOW_LOSS + NORM_ROPE_SWIGLU + CROSS_ENTROPY


def is_caught(mutation: Mutation, folder: Path) -> bool:
    """Whether the tests fail on a copy of the package with the error in it."""
    copy = folder / "megabagel_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / mutation.file
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
    parser.add_argument("--only", default="", help="errors whose name or file contains this")
    only = parser.parse_args().only
    missed = 0
    for mutation in MUTATIONS:
        if only in mutation.name or only in mutation.file:
            with tempfile.TemporaryDirectory() as folder:
                caught = is_caught(mutation, Path(folder))
            print("caught" if caught else "MISSED", mutation.name, sep="  ", flush=True)
            missed += not caught
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The loss curve of one config on many grids, side by side: `python tools/topology_table.py CONFIG [--out FILE]`.

Trains CONFIG for a few steps on every grid with local ranks and compares each step's loss with the first grid's. Exits
with 1 if a grid differs by more than --tolerance (relative). Takes a minute or two per grid on a laptop.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

GRIDS = (  # tp, pp, vpp, cp, dp
    (1, 1, 1, 1, 1),
    (2, 1, 1, 1, 1),
    (1, 2, 1, 1, 1),
    (1, 2, 2, 1, 1),
    (1, 1, 1, 2, 1),
    (1, 1, 1, 1, 2),
    (2, 2, 1, 1, 1),
    (2, 1, 1, 2, 1),
    (2, 2, 1, 2, 1),
    (1, 2, 1, 2, 2),
    (2, 2, 1, 2, 2),
)


def main() -> int:
    """Run all grids and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--out", type=Path, help="write the table there as Markdown, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = [curve(args.config, grid, args.steps, args.overrides, Path(folder)) for grid in GRIDS]
    rows = [row(grid, found, curves[0]) for grid, found in zip(GRIDS, curves, strict=True)]
    head = ["| tp, pp, vpp, cp, dp | ranks | last loss | worst relative difference |", "| --- " * 4 + "|"]
    table = "\n".join([*head, *rows])
    print(table)
    if args.out:
        args.out.write_text(table + "\n")
    return int(max(worst(found, curves[0]) for found in curves) > args.tolerance)


def curve(config: Path, grid: Sequence[int], steps: int, overrides: Sequence[str], folder: Path) -> list[float]:
    """Losses of a fresh run on a grid."""
    tp, pp, vpp, cp, dp = grid
    run = folder / "-".join(map(str, grid))
    command = [sys.executable, "-m", "megabagel", "train", str(config), *overrides, f"train.steps={steps}"]
    command += [f"run.dir={run}", "run.resume=none", "telemetry.sample_every=0", "checkpoint.every=0"]
    command += [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.vpp={vpp}", f"parallel.cp={cp}"]
    subprocess.run([*command, "--nproc", str(tp * pp * cp * dp)], check=True, stdout=subprocess.DEVNULL)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(*grid, losses[-1], file=sys.stderr, flush=True)
    return losses


def worst(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two curves of equal length."""
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(found, expected, strict=True))


def row(grid: Sequence[int], found: Sequence[float], expected: Sequence[float]) -> str:
    """One line of the table."""
    tp, pp, _, cp, dp = grid
    return f"| {', '.join(map(str, grid))} | {tp * pp * cp * dp} | {found[-1]:.9f} | {worst(found, expected):.1e} |"


if __name__ == "__main__":
    sys.exit(main())

"""Kills a run with SIGKILL at random moments until it is done, and compares it with one that nobody disturbed.

    python tools/kill_test.py --kills 50 --steps 300 --out benchmarks/results/kill_test

Losses, gradient norms, counts and final weights must be equal bit for bit, and every step on record exactly once. The
moments are drawn from --seed: while a rank starts and loads, after a few steps, or as soon as a checkpoint is being
written; the victim is one of the two ranks, or both. Ranks are forked from a warm process, which saves seconds of
imports per start. Writes OUT.json and OUT.md; exits with 1 if anything differs.
"""

import argparse
import json
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the ranks, which import tools

from tools.small_run import CONFIG, SETTINGS, write_data  # noqa: E402
from tools.warm_jobs import Job  # noqa: E402

RANKS = 2
EVERY = 5
"""Steps between checkpoints."""
PATIENCE = 120.0
"""Seconds that anything may take."""
TIMED = (
    *("seconds", "data_wait", "tokens_per_s_per_gpu", "mfu_", "vit_flops", "vae_flops", "mem"),
    *("rank_seconds", "slowest_rank"),
)
"""What a record says about the machine."""
OPTIONS = (
    *("telemetry.log_every=1000000", f"checkpoint.every={EVERY}", "checkpoint.keep=2"),
    *("run.heartbeat_timeout=10", "run.start_timeout=10"),
)


@dataclass
class Kill:
    """One kill and what it met."""

    moment: str
    """What was waited for."""
    victims: tuple[int, ...]
    steps: int
    """On record when it came."""
    seconds: float
    """Until every rank was gone."""
    codes: dict[int, int]


@dataclass
class Report:
    """The whole test."""

    seed: int
    steps: int
    grid: str
    kills: list[Kill] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0
    machine: str = f"{platform.machine()}, Python {platform.python_version()}"


class Bench:
    """Starts jobs on a folder of data that all share."""

    def __init__(self, folder: Path, steps: int, grid: list[str]) -> None:
        self.folder, self.steps, self.grid = folder, steps, grid

    def start(self, name: str) -> Job:
        """Start or continue the run `name`."""
        words = [f"run.dir={self.run(name)}", f"data.root={self.folder}/data", f"train.steps={self.steps}"]
        return Job(self.folder / name, RANKS, CONFIG, *SETTINGS, *OPTIONS, *self.grid, *words)

    def run(self, name: str) -> Path:
        """Folder of a run."""
        return self.folder / name / "run"

    def recorded(self, name: str) -> int:
        """Lines of its metrics.jsonl."""
        path = self.run(name) / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def saving(self, name: str) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.run(name) / "checkpoints").glob(".step_*"))


def until(job: Job, holds: Callable[[], bool]) -> bool:
    """Wait until something holds; false if the job has ended before."""
    end = time.monotonic() + PATIENCE
    while not holds():
        if not job.alive:
            return False
        if time.monotonic() > end:
            raise AssertionError("no progress:\n" + "\n".join(job.texts))
        time.sleep(0.001)
    return True


def kill_once(bench: Bench, name: str, draw: random.Random, stride: int) -> Kill | None:
    """Start the run and kill it at a drawn moment; None if it was done before."""
    before = bench.recorded(name)
    job = bench.start(name)
    moment = draw.choice(("load", "step", "step", "save"))
    victims = draw.choice(((0,), (1,), (0, 1), (0, 1)))
    if moment == "load":
        until(job, lambda: any(job.texts)) and time.sleep(draw.uniform(0, 1.5))
    elif moment == "step":
        goal = before // EVERY * EVERY + draw.randint(1, stride)
        until(job, lambda: before != bench.recorded(name) or before == 0) and until(
            job, lambda: bench.recorded(name) >= goal
        )
        time.sleep(draw.uniform(0, 0.1))
    else:
        until(job, lambda: bench.saving(name)) and time.sleep(draw.uniform(0, 0.15))
    if not job.alive:
        job.wait(PATIENCE)
        return None
    steps, start = bench.recorded(name), time.monotonic()
    job.signal(signal.SIGKILL, *victims)
    codes = job.wait(PATIENCE)
    return Kill(moment, victims, steps, time.monotonic() - start, codes)


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(TIMED)} for line in lines]


def weights(folder: Path) -> dict[str, Any]:
    """Checksums of the tensor files of the newest checkpoint."""
    manifest = json.loads(
        (folder / "checkpoints" / (folder / "checkpoints/latest").read_text() / "manifest.json").read_text()
    )
    return {name: file for name, file in manifest["files"].items() if name.endswith(".safetensors")}


def differences(found: Path, expected: Path, steps: int) -> list[str]:
    """What is not equal."""
    mine, theirs = records(found), records(expected)
    said = []
    if [line["step"] for line in mine] != list(range(1, steps + 1)):
        said.append(f"steps on record: {len(mine)}, each of 1 to {steps} expected once")
    for one, other in zip(mine, theirs, strict=False):
        said += [
            f"step {other['step']}: {key} is {one.get(key)!r}, not {other[key]!r}"
            for key in other
            if one.get(key) != other[key]
        ]
    if weights(found) != weights(expected):
        said.append("the final weights, moments or averages differ")
    return said


def kill_test(folder: Path, kills: int, steps: int, seed: int, grid: list[str]) -> Report:
    """Run both runs and compare them."""
    report = Report(seed, steps, " ".join(grid) or "dp 2")
    started, draw, bench = time.monotonic(), random.Random(seed), Bench(folder, steps, grid)
    write_data(folder / "data")
    assert set(bench.start("undisturbed").wait(PATIENCE + steps).values()) == {0}
    while len(report.kills) < kills:
        left = steps - bench.recorded("killed")
        kill = kill_once(bench, "killed", draw, stride=max(1, 2 * left // (kills - len(report.kills)) - EVERY))
        if kill is None:
            break
        report.kills.append(kill)
        print(f"kill {len(report.kills)}/{kills}: {kill}", flush=True)
    codes = bench.start("killed").wait(PATIENCE + steps)
    assert set(codes.values()) == {0}, codes
    report.differences = differences(bench.run("killed"), bench.run("undisturbed"), steps)
    report.seconds = time.monotonic() - started
    return report


def markdown(report: Report) -> str:
    """The report for a reader."""
    moments = Counter(kill.moment for kill in report.kills)
    victims = Counter(" and ".join(map(str, kill.victims)) for kill in report.kills)
    longest = max((kill.seconds for kill in report.kills), default=0.0)
    verdict = "bit-identical" if not report.differences else f"{len(report.differences)} differences"
    lines = [
        "# Kill test",
        "",
        "Written by `python tools/kill_test.py`: a run of two ranks, killed with SIGKILL at drawn moments and started",
        "again until it is done, beside one that nobody disturbed.",
        "",
        "| | |",
        "| --- | --- |",
        f"| result | **{verdict}**: every step once; losses, norms, counts; final weights, moments, averages |",
        f"| kills | {len(report.kills)}: "
        + ", ".join(f"{count} {name}" for name, count in sorted(moments.items()))
        + " |",
        "| victims | " + ", ".join(f"rank {name}: {count}" for name, count in sorted(victims.items())) + " |",
        f"| longest time until every rank was gone | {longest:.1f} s |",
        f"| steps, grid, seed | {report.steps}, {report.grid}, {report.seed} |",
        f"| time, machine | {report.seconds:.0f} s, {report.machine} |",
    ]
    return "\n".join([*lines, "", *(f"- {line}" for line in report.differences[:50]), ""])


def main() -> int:
    """Run the test, print and write the report; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings of the grid, such as parallel.tp=2")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="OUT.json and OUT.md are written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = kill_test(Path(folder), args.kills, args.steps, args.seed, args.overrides)
    print(markdown(report))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(asdict(report), indent=1))
        args.out.with_suffix(".md").write_text(markdown(report))
    return bool(report.differences)


if __name__ == "__main__":
    sys.exit(main())

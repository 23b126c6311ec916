"""One measurement: warm-up steps, timed steps, and further steps timed by phase."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date

import psutil
import torch

from megabagel.bench.phases import PHASES, by_phase, stopwatch
from megabagel.bench.profile import profiled
from megabagel.bench.report import Measurement
from megabagel.bench.synthetic import noise, synthetic_sources
from megabagel.checkpoint.manifest import versions
from megabagel.config.schema import Config
from megabagel.data.load.loader import Step
from megabagel.data.tokenize.tokenizer import ByteTokenizer
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.device import current_device, peak_memory
from megabagel.runtime.objects import all_gathered
from megabagel.sequence.flops import Flops
from megabagel.sequence.sizes import total
from megabagel.train.build import Data, build_trainer
from megabagel.train.run import in_step
from megabagel.train.throughput import peak_flops
from megabagel.train.trainer import Trainer

BUSY = ("forward", "backward", "vit", "vae", "inputs")


@dataclass(frozen=True)
class Request:
    """How much to measure."""

    warmup: int
    steps: int
    phased: int
    """Further steps timed by phase; apart from the timed ones, as timing phases synchronizes the device."""
    synthetic: bool = False
    """Use random sizes and noise instead of files."""
    profile: str | None = None
    """Folder for a trace and a memory snapshot of two further steps on rank 0; None: neither."""

    @property
    def all(self) -> int:
        """Steps that the data are prepared for."""
        return self.warmup + self.steps + self.phased + 2 * (self.profile is not None)


def measure(name: str, config: Config, mesh: Mesh, request: Request) -> Measurement:
    """Train `request.all` steps of a fresh run and return their times. Called on every rank, equal on all.

    No checkpoint and no metrics are written.

    Args:
        name: label of the measurement.
        config: run to measure.
        mesh: grid of the job.
        request: numbers of steps, and the kind of data.
    """
    drawn = Data(synthetic_sources(config), ByteTokenizer(), noise, None) if request.synthetic else None
    trainer = build_trainer(config, mesh, drawn)
    feed = in_step(trainer.loader.steps(request.all))
    for _ in range(request.warmup):
        trainer.train_step(next(feed))
    seconds, steps = _run(trainer, feed, request.steps)
    steady = _memory()
    phases = _phases(trainer, feed, request.phased)
    if request.profile is not None:
        with profiled(request.profile, first=mesh.world.first):
            for _ in range(2):
                trainer.train_step(next(feed))
    ranks = _gathered(mesh, (phases, steady, peak_memory()))
    means = {phase: sum(found[phase] for found, _, _ in ranks) / len(ranks) for phase in PHASES}
    size = total(pack.size for step in steps for pack in step.plan.packs)
    flops = sum((flops for step in steps for flops in step.plan.flops), Flops(0, 0, 0, 0))
    peak = peak_flops(config, current_device())
    grid = config.parallel
    about = versions()
    return Measurement(
        name=name,
        config=asdict(config),
        world=mesh.world.size,
        grid={"tp": grid.tp, "pp": grid.pp, "vpp": grid.vpp, "cp": grid.cp, "dp": mesh.dp.size},
        device=_device(),
        batches="synthetic" if request.synthetic else "real",
        peak_flops=peak.flops,
        peak_source=peak.source,
        steps=seconds,
        tokens=size.tokens / len(steps),
        tokens_und=(size.tokens - size.tokens_gen) / len(steps),
        tokens_gen=size.tokens_gen / len(steps),
        rows=trainer.runner.rows * config.train.packs_per_step,
        samples=size.samples / len(steps),
        flops={kind: getattr(flops, kind) / len(steps) for kind in ("official", "masked", "vit", "vae")},
        phases=means,
        phased_step=sum(means.values()),
        busy=[sum(found[phase] for phase in BUSY) for found, _, _ in ranks],
        planned=_planned(steps, mesh.dp.size),
        memory_peak=[peak for _, _, peak in ranks],
        memory_steady=[steady for _, steady, _ in ranks],
        versions={name: number for name, number in about.items() if name != "commit"},
        commit=about.get("commit", "unknown"),
        date=date.today().isoformat(),
    )


def _run(trainer: Trainer, feed: Iterator[Step], count: int) -> tuple[list[float], list[Step]]:
    """Seconds of each of `count` steps, data included, and the steps."""
    seconds, steps = [], []
    for _ in range(count):
        _settle()
        started = time.perf_counter()
        steps.append(next(feed))
        trainer.train_step(steps[-1])
        _settle()
        seconds.append(time.perf_counter() - started)
    return seconds, steps


def _phases(trainer: Trainer, feed: Iterator[Step], count: int) -> dict[str, float]:
    """Seconds per step by phase, on this rank."""
    with stopwatch() as watch:
        for _ in range(count):
            trainer.train_step(next(feed))
    return {phase: seconds / count for phase, seconds in by_phase(watch).items()}


def _planned(steps: list[Step], ranks: int) -> float:
    """Most over mean work of a data-parallel rank, by the plan, averaged over steps."""
    found = []
    for step in steps:
        works = [
            sum(step.plan.flops[number].masked + step.plan.flops[number].vit for number in step.plan.share(rank, ranks))
            for rank in range(ranks)
        ]
        found.append(max(works) * ranks / sum(works))
    return sum(found) / len(found)


def _gathered(mesh: Mesh, mine: tuple[dict[str, float], int, int]) -> list[tuple[dict[str, float], int, int]]:
    return [tuple(found) for found in all_gathered(mine)]


def _settle() -> None:
    if current_device().type == "cuda":
        torch.cuda.synchronize()


def _memory() -> int:
    """Bytes that this process holds now: on its GPU, or resident."""
    if current_device().type == "cuda":
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def _device() -> str:
    if current_device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads per rank"

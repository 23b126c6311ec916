"""`megabagel parity` on one rank: every case on the grid of the job, compared and timed."""

import logging
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megabagel.config.checks import check_world
from megabagel.config.schema import Config
from megabagel.parallel.mesh import Mesh, build, joined, teardown
from megabagel.parity import infer_case, prim_case, srum_case, srum_pure, trace_case, train_case
from megabagel.parity.case import Case, open_case, stem_of, understood
from megabagel.parity.comparisons import SPLIT, Gates
from megabagel.parity.report import Clock, Report, check_writable, from_plain, write_json
from megabagel.runtime.device import current_device
from megabagel.runtime.objects import broadcast
from megabagel.sequence.flops import TRAIN, needed_flops

DIFFERS = 1
"""Exit code: a row fails."""


@dataclass(frozen=True)
class Request:
    """Options of one run over the cases."""

    cases: tuple[Path, ...]
    overrides: tuple[str, ...] = ()
    runs: int = 0
    """Timed passes; 0: none."""
    random_weights: bool = False
    """Weights by our own initialisation, and nothing compared but the sequence plan."""
    json: Path | None = None


def main(request: Request) -> int:
    """Run all cases; returns the exit code. Called once per rank."""
    everything = [open_case(path) for path in dict.fromkeys(map(stem_of, request.cases))]
    reports = []
    if request.json:
        check_writable(request.json)
    with joined() as world:
        logging.getLogger("megabagel").setLevel(logging.WARNING)
        for case in everything:
            reports.append(_run(case, request, world.size))
            if world.rank == 0:
                print(reports[-1].text(), flush=True)
        if request.json and world.rank == 0:
            write_json(request.json, reports, _about(request, world.size))
    if not all(report.passed for report in reports):
        return DIFFERS
    return 0


def _about(request: Request, size: int) -> dict[str, object]:
    return {
        "ranks": size,
        "overrides": list(request.overrides),
        "device": str(current_device()),
        "torch": torch.__version__,
        "random_weights": request.random_weights,
    }


def _run(case: Case, request: Request, size: int) -> Report:
    """One case, with the grid that its config asks for."""
    if case.kind == "prim":
        notes = [f"not compared, ours differs on purpose: {name}" for name in prim_case.left_out(case)]
        return _agreed(Report(case.name, prim_case.compare_blocks(case, Gates()), notes=notes))
    if case.kind == "srum" and srum_pure.is_pure(case):
        with understood(case):
            rows, notes = srum_pure.compare_pure(case, Gates())
        return _agreed(Report(case.name, rows, notes=notes))
    overrides = list(request.overrides)
    with understood(case):
        config = _config(case, overrides, size)
    check_world(config, size)
    mesh = build(config)
    try:
        gates = Gates(1.0 if size == mesh.dp.size else SPLIT, config.train.precision == "bf16")
        run = {"trace": _trace, "infer": _infer, "srum": _srum}.get(case.kind, _train)
        return _agreed(run(case, config, mesh, gates, request))
    finally:
        teardown()


def _config(case: Case, overrides: list[str], size: int) -> Config:
    """The config of a case of any kind with a model."""
    if case.kind == "trace":
        return trace_case.trace_config(case, overrides)
    if case.kind == "infer":
        return infer_case.infer_config(case, overrides, size)
    if case.kind == "srum":
        return srum_case.srum_config(case, overrides, size)
    return train_case.train_config(case, overrides, size)


def _agreed(report: Report) -> Report:
    """Rank 0's report, on every rank."""
    return from_plain(broadcast(asdict(report)))


def _trace(case: Case, config: Config, mesh: Mesh, gates: Gates, request: Request) -> Report:
    rule, notes = trace_case.rule_of(case), []
    if request.runs or request.random_weights:
        notes.append("--time and --random-weights are for train_* cases; this one ran without")
    several = len(case.entry("plan_list")[0]) > 1
    if several and config.train.loss_normalization != rule:
        notes.append(f"this trace was computed with train.loss_normalization={rule}")
    return Report(case.name, trace_case.compare_trace(case, config, mesh, gates), notes=notes)


def _infer(case: Case, config: Config, mesh: Mesh, gates: Gates, request: Request) -> Report:
    notes = []
    if request.runs or request.random_weights:
        notes.append("--time and --random-weights are for train_* cases; this one ran without")
    return Report(case.name, infer_case.compare_inference(case, config, mesh, gates), notes=notes)


def _srum(case: Case, config: Config, mesh: Mesh, gates: Gates, request: Request) -> Report:
    notes = []
    if request.runs or request.random_weights:
        notes.append("--time and --random-weights are for train_* cases; this one ran without")
    compare = srum_case.compare_srum_trace if srum_case.is_trace(case) else srum_case.compare_srum
    rows, more = compare(case, config, mesh, gates)
    return Report(case.name, rows, notes=notes + more)


def _train(case: Case, config: Config, mesh: Mesh, gates: Gates, request: Request) -> Report:
    run = train_case.prepare(case, config, mesh, request.random_weights)
    if request.random_weights:
        rows = train_case.compare_plan(run, gates) if mesh.world.first else []
    else:
        rows = train_case.compare_case(run, gates)
    clock = _time(run, request.runs) if request.runs else None
    notes = ["random weights: the sequence plan alone is compared"] if request.random_weights else []
    if not run.machine.builder.attention.has_backward:
        notes.append(f"no gradients: attention engine {run.machine.builder.attention.name} has no backward here")
    if "samples" not in case.about:
        notes.append("samples are not described: the sequence plan was read off the batch")
    return Report(case.name, rows, clock, notes)


def _time(run: train_case.TrainRun, runs: int) -> Clock:
    """Median seconds of forward and backward, after one pass to warm up."""
    train_case.step(run)
    passes = []
    for _ in range(runs):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        train_case.step(run)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
        passes.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall_seconds, cpu_seconds = (statistics.median(column) for column in zip(*passes, strict=True))
    total = torch.tensor(cpu_seconds, dtype=torch.float64, device=current_device())
    dist.all_reduce(total)
    backward = run.machine.builder.attention.has_backward
    packs = run.machine.runner.fewest_micro_batches * run.machine.mesh.dp.size
    work = needed_flops(run.official.pack, run.machine.config.model) * packs / (1 if backward else TRAIN)
    return Clock(
        runs, wall_seconds, float(total), work / wall_seconds / 1e9, "forward + backward" if backward else "forward"
    )

"""Training run: join the job, build the trainer or resume it from a checkpoint, and step until `train.steps`.

The loop lives here; one step, one save and one resume are methods of `train/trainer.py`.
docs/architecture.md#how-a-step-flows follows one batch through the rooms.
"""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from megabagel.checkpoint import api
from megabagel.config.load import dump
from megabagel.config.schema import Config
from megabagel.data.load.loader import Step
from megabagel.errors import BadStep, Corrupted, Preempted, UserError
from megabagel.locks import inside, locked
from megabagel.log import RANK0, configure_log
from megabagel.parallel.mesh import Mesh, distributed
from megabagel.runtime.collective_errors import all_max, all_union, on_all_ranks, on_rank0
from megabagel.runtime.device import comm_backend, current_device, peak_memory
from megabagel.runtime.phase import finished, keepalive, phase
from megabagel.runtime.rank_clock import clock
from megabagel.runtime.signals import StopRequest
from megabagel.train.anomaly import StepAnomaly
from megabagel.train.bad_step_dump import bad_step_dump, dump_path
from megabagel.train.build import Data, build_trainer, open_data
from megabagel.train.sample_images import SamplerFactory
from megabagel.train.saved import done
from megabagel.train.schedule import learning_rate
from megabagel.train.step import Losses
from megabagel.train.stragglers import StragglerWatch, rank_times
from megabagel.train.telemetry import Telemetry
from megabagel.train.throughput import StepTimer, peak_flops, rates
from megabagel.train.trainer import Outcome, Trainer

logger = logging.getLogger(__name__)


def main(config: Config, stop: StopRequest | None = None, sampler: SamplerFactory | None = None) -> None:
    """Train `config` on the ranks of this job. Called once per rank; arguments and errors as of `records`."""
    for _ in records(config, stop, sampler):
        pass


def records(
    config: Config, stop: StopRequest | None = None, sampler: SamplerFactory | None = None
) -> Iterator[dict[str, Any]]:
    """Train `config` on the ranks of this job and yield the record of every finished step, equal on all ranks.

    Called once per rank. Closing the generator ends the run between two steps: a checkpoint that is being written is
    completed, the steps after it are not saved.

    Args:
        config: the run.
        stop: signals to obey between steps; None: none.
        sampler: makes the samples of `telemetry`; needed with telemetry.sample_every > 0.

    Raises:
        Preempted: `stop` received a signal on any rank; the run is saved.
        BadStep: a step with an anomaly for which the config demands a stop.
        UserError: a mistake in the config, the data or the environment; the same error on all ranks.
    """
    with distributed(config) as mesh, ExitStack() as owned:
        configure_log(mesh.world.rank)
        logger.info("grid: %s, %s on %s", mesh.describe(), config.train.precision, comm_backend())
        folder = Path(config.run.dir)
        # Half of run.timeout at most: the other ranks wait in `on_rank0` meanwhile, and a phase of run.timeout counts
        # as hung.
        patience = min(config.run.heartbeat_timeout, config.run.timeout / 2)
        lock = locked(inside(folder), f"run.dir={folder}", patience, keepalive)
        on_rank0(lambda: owned.enter_context(lock))
        on_rank0(lambda: _probe(folder))
        data = open_data(config)
        with phase("load"):
            checkpoint = api.find(config, mesh)
        with phase("build"):
            trainer = _build(config, mesh, data, checkpoint, sampler)
        # Last, because every check that can refuse a start has passed: a refused start must leave the folder's config
        # and checkpoints as they were.
        on_rank0(lambda: _take_over(config, folder))
        first = mesh.world.first
        telemetry = on_all_ranks(lambda: Telemetry(config, first=first, step=trainer.step))
        finished(trainer.step)
        try:
            with phase("train"):
                yield from _loop(trainer, telemetry, stop or StopRequest())
        except GeneratorExit:
            trainer.saver.close()
            raise
        finally:
            telemetry.close()


def _build(config: Config, mesh: Mesh, data: Data, checkpoint: Path | None, sampler: SamplerFactory | None) -> Trainer:
    """Return the trainer with its weights: those of the checkpoint to resume, of `run.init_from`, or new ones."""
    source = checkpoint or (Path(config.run.init_from) if config.run.init_from else None)
    # No initial weights are drawn where a checkpoint overwrites them.
    trainer = build_trainer(config, mesh, data, draw=source is None, samplers=sampler)
    if source is not None:
        (trainer.resume if checkpoint else trainer.start_from)(source)
    return trainer


def _loop(trainer: Trainer, telemetry: Telemetry, stop: StopRequest) -> Iterator[dict[str, Any]]:
    """Step, log, sample and save until `train.steps`; yields the record of each step that was not rolled back."""
    config, mesh = trainer.config, trainer.mesh
    peak = peak_flops(config, current_device())
    logger.info("peak for MFU: %.3g FLOP/s per rank (%s)", *peak)
    if trainer.step >= config.train.steps:
        logger.info("%s", done(config, trainer.step))
    watch = StragglerWatch(config.telemetry, mesh)
    timer = StepTimer()
    for step in _steps(trainer):
        outcome = trainer.train_step(step)
        stop.finished += 1
        # The signal travels with an all-reduce that every step has anyway: a signal that reaches only some ranks stops
        # all of them after the same step. So do the ranks' own times, each in its place, in microseconds.
        own = [0] * mesh.world.size
        own[mesh.world.rank] = round((step.own_wait + clock.seconds()) * 1e6)
        lost, signalled, *times = all_max(len(step.lost), stop.number, *own)
        own_seconds = [time / 1e6 for time in times]
        # Ranks of one data-parallel replica may read the same image, so lost images are counted as a union. The
        # all-gather is rare: it happens only when some rank lost one.
        trainer.lost_images += len(all_union(frozenset(map(repr, step.lost)))) if lost else 0
        # After the all-reduce, which waits for the slowest rank: the time of the job's step, not of this rank's.
        seconds = timer.lap()
        finished(trainer.step)
        if outcome.anomaly and _apply_policy(trainer, step, outcome, outcome.anomaly):
            on_rank0(partial(telemetry.rewind, trainer.step))
            continue
        record = _record(trainer, step, outcome.losses, outcome.norm)
        flops = sum(step.plan.flops[1:], step.plan.flops[0])
        speed = rates(flops, record["tokens"], seconds, mesh.world.size, peak)
        record |= {"seconds": seconds, "data_wait": step.waited, **speed, "mem": peak_memory()}
        record |= rank_times(own_seconds)
        watch.add(trainer.step, own_seconds)
        last = trainer.step == config.train.steps
        if trainer.held_out and (last or trainer.step % config.train.val_every == 0):
            with timer.apart():
                record |= trainer.held_out.measure().columns(config.train)
        with phase("telemetry"):
            on_rank0(partial(telemetry.log_step, record))
        if trainer.sampler and (last or trainer.step % config.telemetry.sample_every == 0):
            with timer.apart():
                _sample(trainer, telemetry)
        with phase("checkpoint"):
            # Collective: completes an asynchronous checkpoint once every rank has written its file.
            trainer.saver.poll()
        if last or signalled or (config.checkpoint.every and trainer.step % config.checkpoint.every == 0):
            with timer.apart():
                saved = _save(trainer, telemetry, step.plan.state)
            if not saved:
                continue
        if signalled and not last:
            with phase("checkpoint"):
                trainer.saver.close()
            raise Preempted(
                f"{signal.Signals(signalled).name} after step {trainer.step} of {config.train.steps}; everything is "
                f"saved in {trainer.newest}. Start the same command again to go on."
            )
        yield record
    with phase("checkpoint"):
        trainer.saver.close()


def _save(trainer: Trainer, telemetry: Telemetry, plan_state: dict[str, Any]) -> bool:
    """Save a checkpoint; False if ranks' copies differ and the run went back to the checkpoint before."""
    if (corruption := trainer.compare_copies()) is None:
        trainer.save(plan_state)
        return True
    _roll_back_or_stop(trainer, corruption)
    on_rank0(partial(telemetry.rewind, trainer.step))
    return False


def _sample(trainer: Trainer, telemetry: Telemetry) -> None:
    """Make and record the samples of `telemetry`."""
    with phase("sampling"):
        pictures = trainer.sample()
        on_rank0(partial(telemetry.log_images, trainer.step, pictures))


def _steps(trainer: Trainer) -> Iterator[Step]:
    """Yield steps until the last one is finished. After a rollback, as many more follow as it undid."""
    while (left := trainer.config.train.steps - trainer.step) > 0:
        yield from in_step(trainer.loader.steps(left))


def in_step(steps: Iterator[Step]) -> Iterator[Step]:
    """Yield steps while every rank has its part of the next one.

    `next` runs inside `on_all_ranks`, so that a rank whose data fails (a shard was removed) raises its error on all
    ranks instead of leaving the others in the forward pass.
    """
    while True:
        started = time.perf_counter()
        with phase("data"):
            step = on_all_ranks(partial(_next, steps))
        if step is None:
            return
        yield replace(step, waited=time.perf_counter() - started)


def _next(steps: Iterator[Step]) -> Step | None:
    """Return this rank's part of the next step, with the seconds that it took; None after the last."""
    started = time.perf_counter()
    step = next(steps, None)
    return None if step is None else replace(step, own_wait=time.perf_counter() - started)


def _apply_policy(trainer: Trainer, step: Step, outcome: Outcome, anomaly: StepAnomaly) -> bool:
    """Dump the samples of a bad step and apply the policy of its anomaly; returns whether the run was rolled back."""
    folder, mesh = Path(trainer.config.run.dir), trainer.mesh
    path = dump_path(folder, step.plan)
    losses, norm = outcome.losses, outcome.norm
    on_rank0(lambda: bad_step_dump(path, anomaly, losses, norm, step.plan, mesh.dp.size, trainer.plan))
    logger.warning(
        "step %d: %s; %s (%s=%s); samples of the step: %s",
        *(trainer.step, anomaly.what, _DONE[anomaly.action], anomaly.setting, anomaly.action, path),
        extra=RANK0,
    )
    if anomaly.action == "stop":
        others = "train.on_nonfinite and train.on_spike (skip, rollback) make a run go on."
        advice = others if anomaly.ending is BadStep else _ELSEWHERE
        raise anomaly.ending(
            f"step {trainer.step}: {anomaly.what}. No update was made and no checkpoint written. {path} lists its "
            f"samples and has the command that replays it; {advice}"
        )
    if anomaly.action == "rollback":
        trainer.roll_back(anomaly)
    return anomaly.action == "rollback"


def _roll_back_or_stop(trainer: Trainer, corruption: StepAnomaly) -> None:
    """Apply `train.on_corruption` to copies that differ. The step is no cause of it, so no samples are dumped.

    Raises:
        Corrupted: the policy is `stop`, or there is nothing to roll back to.
    """
    logger.warning("step %d: %s; %s (%s=%s)", trainer.step, corruption.what, _DONE[corruption.action],
                   corruption.setting, corruption.action, extra=RANK0)  # fmt: skip
    if corruption.action == "rollback":
        trainer.roll_back(corruption)
        return
    kept = f"{trainer.newest} is from before" if trainer.newest else "there is no earlier one"
    raise Corrupted(f"step {trainer.step}: {corruption.what}. No checkpoint was written; {kept}: {_ELSEWHERE}")


_ELSEWHERE = "start the same command again without these hosts, or set train.on_corruption=rollback."
"""Next step after a corruption."""
_DONE = {"record": "kept going", "stop": "stopping", "skip": "update skipped", "rollback": "rolling back"}
"""Wording of the log line, by action."""


def _record(trainer: Trainer, step: Step, losses: Losses, norm: float) -> dict[str, Any]:
    """Return the part of a step's metrics.jsonl line that is equal on every grid up to rounding (no timings)."""
    plan = step.plan
    by_source: dict[str, float] = {}
    counts = plan.tokens_by_source()
    for number, source in enumerate(trainer.config.data.sources):
        ce, mse = counts.get(source.name, (0, 0))
        ce_sum, mse_sum = losses.sums[:, :, number].sum(0).tolist()
        by_source |= {f"loss_ce/{source.name}": ce_sum / ce} if ce else {}
        by_source |= {f"loss_mse/{source.name}": mse_sum / mse} if mse else {}
    size = plan.size
    return {
        "step": trainer.step,
        "updates": trainer.updates,
        "loss": losses.total,
        "loss_ce": losses.ce,
        "loss_mse": losses.mse,
        **by_source,
        "grad_norm": norm,
        "lr": learning_rate(trainer.config.train, trainer.step - 1),
        "tokens": size.tokens,
        "tokens_und": size.tokens - size.tokens_gen,
        "tokens_gen": size.tokens_gen,
        "samples": size.samples,
        "skipped": sum(plan.skipped.values()),
        "lost_images": trainer.lost_images,
    }


def _probe(folder: Path) -> None:
    """Raise UserError if the run folder cannot be written: found at the start rather than at the first checkpoint.

    Existing files are not touched.
    """
    checkpoints = folder / "checkpoints"
    with _writing(folder):
        checkpoints.mkdir(parents=True, exist_ok=True)
        for place in (folder, checkpoints):
            TemporaryFile(dir=place).close()


def _take_over(config: Config, folder: Path) -> None:
    """Claim the run folder: write this run's config, and move checkpoints aside that it does not resume from.

    They are renamed rather than deleted: `run.resume=none` in a script that is requeued would otherwise destroy a run.
    """
    checkpoints = folder / "checkpoints"
    with _writing(folder):
        if config.run.resume == "none" and any(checkpoints.glob("step_*")):
            aside = next(path for number in count(1) if not (path := folder / f"checkpoints-{number}").exists())
            checkpoints.rename(aside)
            checkpoints.mkdir()
            logger.warning("run.resume=none: the checkpoints of an earlier run are now in %s", aside, extra=RANK0)
        _keep_other(folder / "config.yaml", config)
        dump(config, folder / "config.yaml")


def _keep_other(path: Path, config: Config) -> None:
    """Rename the config file of an earlier start to `config-N.yaml` if its content differs from this one."""
    if path.is_file():
        new = path.with_name(".config.new")
        dump(config, new)
        differs = new.read_bytes() != path.read_bytes()
        new.unlink()
        if differs:
            path.rename(next(p for n in count(1) if not (p := path.with_name(f"config-{n}.yaml")).exists()))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run.dir={folder}: cannot be written ({error}); choose a folder with space and rights"
        ) from error

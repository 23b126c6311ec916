"""Trainer of one rank: one step, saving a checkpoint, resuming from one and rolling back to one."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megabagel.checkpoint import api
from megabagel.checkpoint.checksums import ANOTHER
from megabagel.checkpoint.saver import Saver
from megabagel.checkpoint.tensors import optimizer_shards, sharded_tensors
from megabagel.config.schema import Config
from megabagel.config.typed_json import Count, WrongValue, read_as
from megabagel.data.load.loader import Loader, Step
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.errors import Corrupted, UserError
from megabagel.log import RANK0
from megabagel.model.inputs import StageInputs
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.collective_errors import on_all_ranks
from megabagel.runtime.phase import phase
from megabagel.runtime.rank_clock import clock
from megabagel.train.anomaly import LossSpikeDetector, StepAnomaly
from megabagel.train.feed import InputFeed
from megabagel.train.held_out import HeldOut
from megabagel.train.optimizer import Optimizer
from megabagel.train.recompute_check import recomputed_differently
from megabagel.train.replicas import replica_differences
from megabagel.train.resume_changes import log_changes
from megabagel.train.sample_images import Sampler
from megabagel.train.schedule import learning_rate
from megabagel.train.step import Counts, Losses, StepRunner, denominators

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Result of a step: losses, gradient norm before clipping, and the anomaly, if there is one."""

    losses: Losses
    norm: float
    anomaly: StepAnomaly | None


@dataclass(frozen=True)
class RunState:
    """JSON state of a checkpoint (`state.json`): data plan, counters and the window of the spike detector."""

    plan: dict[str, Any]
    updates: Count
    lost_images: Count
    judge: dict[str, Any]


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn a WrongValue of a checkpoint's state into a UserError that names the file and the value."""
    try:
        yield
    except WrongValue as error:
        raise UserError(f"{folder / api.STATE}: no state of a run ({error}). {ANOTHER}") from error


@dataclass
class Trainer:
    """Everything one rank needs for training; `train/build.py` assembles it from a config and a mesh."""

    config: Config
    mesh: Mesh
    plan: GlobalPlan
    loader: Loader
    optimizer: Optimizer
    runner: StepRunner
    builder: InputBuilder
    sampler: Sampler | None
    saver: Saver
    detector: LossSpikeDetector
    step: int = 0
    """Finished steps, including those whose update was skipped."""
    updates: int = 0
    """Weight updates; AdamW's bias correction counts these, not steps."""
    lost_images: int = 0
    """Images that could not be decoded, summed over all ranks."""
    newest: Path | None = None
    """Checkpoint written last, or the one this run started from."""
    rollbacks: int = 0
    """Rollbacks to `newest`; 0 again after the next save."""
    held_out: HeldOut | None = None
    """The set of `train.val_every`, or None without one."""

    def train_step(self, step: Step) -> Outcome:
        """Run one step: inputs, forward and backward, anomaly check, update.

        With an anomaly whose policy is not `record`, weights, moments and averaged weights keep their values.
        """
        clock.start()
        inputs = InputFeed(self.builder.build, step.batches, len(self.runner.chunks))
        counts = denominators(self.config.train, step.plan.micro_steps(self.mesh.dp.size))
        corrupted = self._recompute_check(inputs, counts)
        losses = self.runner.backward(inputs, counts)
        with phase("optimizer"):
            # The norm is computed apart from the update: a bad step has to be found before it changes weights or
            # moments.
            norm = self.optimizer.gradient_norm()
            anomaly = corrupted or self.detector.check(self.step + 1, losses.total, norm)
            if anomaly is None or anomaly.updates:
                self.optimizer.update(learning_rate(self.config.train, self.step), norm)
                self.updates += 1
        # A skipped step counts: learning-rate schedule, data and step number go on without it.
        self.step += 1
        return Outcome(losses, norm, anomaly)

    def sample(self) -> dict[str, np.ndarray]:
        """Return samples of the averaged weights, or of the trained ones with train.ema=0: caption -> picture."""
        assert self.sampler is not None
        with self.optimizer.averaged_weights():
            return self.sampler.draw()

    def _recompute_check(self, inputs: Sequence[StageInputs], counts: list[Counts]) -> StepAnomaly | None:
        """Compute a micro-batch twice every `train.recompute_check_every` steps; returns an anomaly if it differs."""
        every = self.config.train.recompute_check_every
        if not every or (self.step + 1) % every:
            return None
        return self._corruption(recomputed_differently(self.runner, inputs, counts))

    def compare_copies(self) -> StepAnomaly | None:
        """Compare what several ranks hold; returns an anomaly if copies differ. Collective."""
        stages = [chunk.module for chunk in self.optimizer.chunks]
        shards = optimizer_shards(self.optimizer.distributed, self.optimizer.ema)
        with phase("checkpoint"):
            return self._corruption(replica_differences(stages, shards, self.mesh))

    def _corruption(self, what: str | None) -> StepAnomaly | None:
        """Return the anomaly of a corruption, with the policy of the config."""
        return StepAnomaly(what, self.config.train.on_corruption, "train.on_corruption", Corrupted) if what else None

    def tensors(self) -> dict[str, Any]:
        """Return this rank's shards as views, keyed and placed as a checkpoint stores them."""
        stages = [chunk.module for chunk in self.optimizer.chunks]
        shards = optimizer_shards(self.optimizer.distributed, self.optimizer.ema)
        return sharded_tensors(stages, shards, self.mesh)

    def save(self, plan_state: dict[str, Any]) -> None:
        """Write a checkpoint of the finished steps; with `checkpoint.async_save`, only start writing it.

        Args:
            plan_state: state of the data plan after the last finished step.
        """
        state = {
            "plan": plan_state,
            "updates": self.updates,
            "lost_images": self.lost_images,
            # The key is part of the checkpoint format and older than the name of the class.
            "judge": self.detector.state(),
        }
        with phase("checkpoint"):
            self.saver.save(self.step, self.tensors(), state)
        self.newest, self.rollbacks = self.saver.folder(self.step), 0

    def resume(self, folder: Path) -> None:
        """Resume from a checkpoint that any grid may have written."""
        state = self._restore(folder)
        on_all_ranks(lambda: self._restore_plan(folder, state.plan))
        logger.info("resumed from %s at step %d", folder, self.step)
        log_changes(folder, self.config)

    def roll_back(self, anomaly: StepAnomaly) -> None:
        """Load the newest checkpoint and continue with the data that follows the bad step.

        The samples between the checkpoint and `anomaly` are skipped: repeating them would repeat the spike (PaLM,
        section 5.1).

        Raises:
            BadStep: there is no checkpoint yet, or `train.max_rollbacks` rollbacks to this one were made; Corrupted
                where that is what happened.
        """
        limit = self.config.train.max_rollbacks
        if self.newest is None or self.rollbacks == limit:
            why = "there is no checkpoint yet" if self.newest is None else f"train.max_rollbacks={limit} is reached"
            raise anomaly.ending(f"step {self.step}: {anomaly.what}, and {why}, so the run cannot roll back")
        # `newest` may still be written by the asynchronous saver.
        self.saver.wait()
        self._restore(self.newest)
        self.rollbacks += 1
        logger.warning("rolled back to %s, step %d; the data goes on", self.newest, self.step, extra=RANK0)

    def _restore(self, folder: Path) -> "RunState":
        """Fill weights, moments, averages and counters from a checkpoint, but not the data plan; returns its state."""
        with phase("load"):
            self.step, state = on_all_ranks(lambda: self._read(folder))
            on_all_ranks(lambda: api.load(folder, self.tensors()))
        self.updates, self.lost_images, self.newest = state.updates, state.lost_images, folder
        self.detector.load_state(state.judge)
        self.optimizer.after_load(self.updates)
        return state

    def _read(self, folder: Path) -> tuple[int, "RunState"]:
        """Read and check the JSON state of a checkpoint; returns (finished steps, state)."""
        step, content = api.read(folder, self.config)
        with _named(folder):
            state = read_as(RunState, content)
            # A trial run on a new detector: a bad window is refused here, by name, before anything of this trainer
            # changes.
            LossSpikeDetector(self.config.train).load_state(state.judge)
            if state.updates > step:
                raise WrongValue(f"updates is {state.updates}; expected at most the {step} steps of {api.MANIFEST}")
        return step, state

    def _restore_plan(self, folder: Path, state: dict[str, Any]) -> None:
        """Load the data plan's state. It may be ahead of the step number: a rollback skips data."""
        with _named(folder):
            self.plan.load_state(state)
            if self.plan.step < self.step:
                raise WrongValue(f"plan.step is {self.plan.step}; expected at least the {self.step} of {api.MANIFEST}")

    def start_from(self, folder: Path) -> None:
        """Load the weights of another run or of an import, for step 0; averaged weights start as copies of them.

        Moments stay at zero: this is a new run, not a resumed one.
        """
        with phase("load"):
            tensors = on_all_ranks(lambda: api.weights_of(folder, self.config, self.tensors()))
            on_all_ranks(lambda: api.load(folder, tensors))
        self.optimizer.after_load(0)
        self.optimizer.start_averages()
        logger.info("weights from %s (%s)", folder, self.config.run.init_weights)

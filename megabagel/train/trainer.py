"""Everything one rank needs to train, and what it does: a step, a checkpoint, going on from one, going back to one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabagel.checkpoint import api
from megabagel.checkpoint.checksums import ANOTHER
from megabagel.checkpoint.saver import Saver
from megabagel.checkpoint.tensors import optimizer_shards, sharded_tensors
from megabagel.config.schema import Config
from megabagel.config.typed_json import Count, WrongValue, read_as
from megabagel.data.load.loader import Loader, Step
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.errors import BadStep, UserError
from megabagel.generate.euler import EulerSampler
from megabagel.log import RANK0
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.collective_errors import on_all_ranks
from megabagel.runtime.phase import phase
from megabagel.train.anomaly import LossSpikeDetector, StepAnomaly
from megabagel.train.optimizer import Optimizer
from megabagel.train.resume_changes import log_changes
from megabagel.train.schedule import learning_rate
from megabagel.train.step import Losses, StepRunner, denominators

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Losses of a step, gradient norm before clipping, and the anomaly, if there is one."""

    losses: Losses
    norm: float
    anomaly: StepAnomaly | None


@dataclass(frozen=True)
class RunState:
    """The JSON state of a checkpoint."""

    plan: dict[str, Any]
    updates: Count
    lost_images: Count
    judge: dict[str, Any]


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turns a value that does not belong in a checkpoint's state into an error that names file and value."""
    try:
        yield
    except WrongValue as error:
        raise UserError(f"{folder / api.STATE}: no state of a run ({error}). {ANOTHER}") from error


@dataclass
class Trainer:
    """Everything one rank needs to train, built from a config on a mesh."""

    config: Config
    mesh: Mesh
    plan: GlobalPlan
    loader: Loader
    optimizer: Optimizer
    runner: StepRunner
    builder: InputBuilder
    sampler: EulerSampler | None
    saver: Saver
    detector: LossSpikeDetector
    step: int = 0
    """Finished steps, those without an update among them."""
    updates: int = 0
    """Updates of the weights made in them."""
    lost_images: int = 0
    """Images of the whole job that could not be decoded in them."""
    newest: Path | None = None
    """The checkpoint that was written last, or that this run started from."""
    rollbacks: int = 0
    """To the newest checkpoint."""

    def train_step(self, step: Step) -> Outcome:
        """One step. With an anomaly whose policy is not `record`, weights, moments and averages stay as they were."""
        with phase("inputs"):
            inputs = [self.builder.build(batch) for batch in step.batches]
        counts = denominators(self.config.train, step.plan.micro_steps(self.mesh.dp.size))
        losses = self.runner.backward(inputs, counts)
        with phase("optimizer"):
            norm = self.optimizer.gradient_norm()
            anomaly = self.detector.check(self.step + 1, losses.total, norm)
            if anomaly is None or anomaly.updates:
                self.optimizer.update(learning_rate(self.config.train, self.step), norm)
                self.updates += 1
        self.step += 1
        return Outcome(losses, norm, anomaly)

    def tensors(self) -> dict[str, Any]:
        """This rank's shards, as a checkpoint holds them."""
        stages = [chunk.module for chunk in self.optimizer.chunks]
        shards = optimizer_shards(self.optimizer.distributed, self.optimizer.ema)
        return sharded_tensors(stages, shards, self.mesh)

    def save(self, plan_state: dict[str, Any]) -> None:
        """Write a checkpoint of the finished steps, or begin to; `plan_state` is the data plan's after the last."""
        state = {
            "plan": plan_state,
            "updates": self.updates,
            "lost_images": self.lost_images,
            "judge": self.detector.state(),  # a key of checkpoints, older than the name of the class
        }
        with phase("checkpoint"):
            self.saver.save(self.step, self.tensors(), state)
        self.newest, self.rollbacks = self.saver.folder(self.step), 0

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint, whatever grid wrote it."""
        state = self._restore(folder)
        on_all_ranks(lambda: self._restore_plan(folder, state.plan))
        logger.info("resumed from %s at step %d", folder, self.step)
        log_changes(folder, self.config)

    def roll_back(self, anomaly: StepAnomaly) -> None:
        """Go on from the newest checkpoint, with the data that follows: the samples before `anomaly` are not met again.

        Skipping the data is what makes a rollback help (PaLM section 5.1). Raises BadStep when there is nothing to go
        back to, or it was gone back to often enough.
        """
        limit = self.config.train.max_rollbacks
        if self.newest is None or self.rollbacks == limit:
            why = "there is no checkpoint yet" if self.newest is None else f"train.max_rollbacks={limit} is reached"
            raise BadStep(f"step {self.step}: {anomaly.what}, and {why}, so the run cannot roll back")
        self.saver.wait()
        self._restore(self.newest)
        self.rollbacks += 1
        logger.warning("rolled back to %s, step %d; the data goes on", self.newest, self.step, extra=RANK0)

    def _restore(self, folder: Path) -> "RunState":
        """Fill everything but the data plan from a checkpoint; returns its JSON state."""
        with phase("load"):
            self.step, state = on_all_ranks(lambda: self._read(folder))
            on_all_ranks(lambda: api.load(folder, self.tensors()))
        self.updates, self.lost_images, self.newest = state.updates, state.lost_images, folder
        self.detector.load_state(state.judge)
        self.optimizer.after_load(self.updates)
        return state

    def _read(self, folder: Path) -> tuple[int, "RunState"]:
        step, content = api.read(folder, self.config)
        with _named(folder):
            state = read_as(RunState, content)
            LossSpikeDetector(self.config.train).load_state(state.judge)
            if state.updates > step:
                raise WrongValue(f"updates is {state.updates}; expected at most the {step} steps of {api.MANIFEST}")
        return step, state

    def _restore_plan(self, folder: Path, state: dict[str, Any]) -> None:
        with _named(folder):
            self.plan.load_state(state)
            if self.plan.step < self.step:  # more after a rollback, which skips data
                raise WrongValue(f"plan.step is {self.plan.step}; expected at least the {self.step} of {api.MANIFEST}")

    def start_from(self, folder: Path) -> None:
        """Take the weights of another run, or imported ones, for step 0; averages start from them."""
        with phase("load"):
            tensors = on_all_ranks(lambda: api.weights_of(folder, self.config, self.tensors()))
            on_all_ranks(lambda: api.load(folder, tensors))
        self.optimizer.after_load(0)
        self.optimizer.start_averages()
        logger.info("weights from %s (%s)", folder, self.config.run.init_weights)

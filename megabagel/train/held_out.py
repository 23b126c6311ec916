"""Held-out loss: cross-entropy and flow loss of a fixed set, by source, task and timestep, on any grid.

Samples, timesteps and noise of the set are keyed by `SEED`, not by `train.seed`: all runs that name the same sources
and packs are measured on the same numbers, so that their losses can be compared in pairs. Training with
`train.val_every` and `megabagel evaluate loss` both call `HeldOut.measure`.

A measurement leaves no trace in a run: it draws no random number that has a state, has its own data plan, and runs
forward without gradients. tests/train/test_held_out.py compares the bits of runs with and without it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megabagel.config.schema import Config, TrainConfig
from megabagel.data.load.collate import Filled, Filler
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.data.plan.planned_sample import Task
from megabagel.model.flow import timestep
from megabagel.model.inputs import Outputs
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.collective_errors import all_max, all_union, on_all_ranks
from megabagel.runtime.device import current_device
from megabagel.runtime.phase import all_reduced, phase
from megabagel.sequence.batch import PackedBatch
from megabagel.sequence.images import index_latents
from megabagel.sequence.pack import Pack
from megabagel.sequence.packing import turns
from megabagel.train.step import ForwardRunner

SEED = 0
"""Of all random draws of the set."""
BINS = 5
"""Equal intervals of the timestep t in [0, 1]."""


def held_out_config(config: Config) -> Config:
    """Return the config by which the held-out set is planned and batched.

    Conditions are kept, except for kinds that training always drops (probability 1): the model has never seen them.
    """
    data = config.data
    dropout: dict[str, Any] = {n: float(getattr(data, n) == 1) for n in ("drop_text", "drop_vit", "drop_latent")}
    # The latent cache holds the images of training; `workers` would start processes for a few packs.
    data = replace(data, sources=data.val_sources, val_sources=(), latents=None, workers=0, **dropout)
    train = replace(config.train, seed=SEED, packs_per_step=config.train.val_packs)
    return replace(config, data=data, train=train)


@dataclass(frozen=True)
class Mean:
    """A mean as its sum and the number of its rows."""

    sum: float = 0.0
    count: int = 0

    @property
    def value(self) -> float | None:
        """The mean; None without any row."""
        return self.sum / self.count if self.count else None

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses of the held-out set, per row of cross-entropy and per latent token."""

    ce: dict[str, Mean]
    """By source."""
    mse: dict[str, tuple[Mean, ...]]
    """By source and interval of the timestep."""
    tasks: dict[str, str]
    """Task of each source."""

    def columns(self, train: TrainConfig) -> dict[str, float]:
        """Return the losses as columns of metrics.jsonl; what no row of the set has is absent."""
        flow = {name: _sum(bins) for name, bins in self.mse.items()}
        by_time = [_sum(bins[number] for bins in self.mse.values()) for number in range(BINS)]
        ce, mse = _sum(self.ce.values()), _sum(flow.values())
        total = train.ce_weight * (ce.value or 0.0) + train.mse_weight * (mse.value or 0.0)
        found = {"val_loss": Mean(total, 1), "val_loss_ce": ce, "val_loss_mse": mse}
        found |= {f"val_loss_ce/{name}": mean for name, mean in self.ce.items()}
        found |= {f"val_loss_mse/{name}": mean for name, mean in flow.items()}
        found |= {f"val_loss_mse/{interval(number)}": mean for number, mean in enumerate(by_time)}
        return {name: mean.value for name, mean in found.items() if mean.value is not None}

    def by_task(self) -> dict[str, tuple[Mean, tuple[Mean, ...]]]:
        """Return (cross-entropy, flow loss by interval) of each task."""
        found: dict[str, tuple[Mean, tuple[Mean, ...]]] = {}
        for name, task in self.tasks.items():
            ce, mse = found.get(task, (Mean(), (Mean(),) * BINS))
            found[task] = ce + self.ce[name], tuple(map(Mean.__add__, mse, self.mse[name]))
        return found


def interval(number: int) -> str:
    """Return the name of an interval of the timestep, such as `t0.2-0.4`; 0 is data, 1 is noise."""
    return f"t{number / BINS:.1f}-{(number + 1) / BINS:.1f}"


def _sum(means: Any) -> Mean:
    return sum(means, Mean())


class HeldOut:
    """The held-out set on this rank. Every method is collective.

    Args:
        config: of the set, from `held_out_config`.
        mesh: process groups of the job.
        plan: of the set's sources, at its start.
        filler: reads and builds this rank's batches of the set.
        builder: input builder of the run.
        runner: of the weights to measure.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        plan: GlobalPlan,
        filler: Filler,
        builder: InputBuilder,
        runner: ForwardRunner,
    ) -> None:
        self.config, self.mesh, self.filler, self.builder, self.runner = config, mesh, filler, builder, runner
        self.fingerprint = plan.fingerprint()
        """Of the contents of every source."""
        step = plan.next_step()
        self._tasks = [plan.task(step, number) for number in range(len(step.packs))]
        self._sources = {name: source.task for name, source in plan.sources.items()}
        # A number of packs that does not divide over the replicas is filled up with packs that are run, not counted.
        absent = -len(step.packs) % mesh.dp.size
        self._share = [turn[mesh.dp.rank] for turn in turns([*step.loads, *[0.0] * absent], mesh.dp.size)]

    def measure(self) -> HeldOutLosses:
        """Return the losses of the current weights, equal on all ranks."""
        table = np.zeros((len(self._sources) + 1, 1 + BINS, 2))
        with phase("validation"):
            for numbers in _groups(self._share, self.mesh.pp.size):
                counted = [number < len(self._tasks) for number in numbers]
                tasks = [self._tasks[number if real else 0] for number, real in zip(numbers, counted, strict=True)]
                filled = on_all_ranks(partial(self._filled, tasks))
                lost = [(image.key, image.slot) for pack in filled for image in pack.lost]
                # Images are lost on the ranks that encode them; their rows are on other ranks.
                unread = all_union(frozenset(map(repr, lost))) if all_max(len(lost))[0] else frozenset()
                batches = [pack.batch for pack in filled]
                outputs = self.runner.outputs([self.builder.build(batch) for batch in batches])
                for batch, output, real in zip(batches, outputs, counted, strict=False):
                    table += self._rows(batch, output, unread) if real else 0
            return self._losses(self._reduced(table))

    def _filled(self, tasks: Sequence[Task]) -> list[Filled]:
        return [self.filler(task) for task in tasks]

    def _rows(self, batch: PackedBatch, outputs: Outputs, lost: frozenset[str]) -> np.ndarray:
        """Return this rank's [sources + 1, 1 + BINS, (sum, count)] of one pack: cross-entropy, then flow loss."""
        rows = batch.rows.arrays()
        train, sources = self.config.train, len(self._sources) + 1
        bin_g = np.append(_bins(batch.pack, lost, train), -1)[rows.latent_g]
        ce_Q, mse_g = (x.detach().double().cpu().numpy() for x in (outputs.ce_Q, outputs.mse_g))
        kept_g = bin_g >= 0
        # In double precision on the CPU: the order of additions is fixed, unlike that of a GPU's `index_add_`.
        ce = [np.bincount(rows.source_Q, weights, minlength=sources) for weights in (ce_Q, None)]
        place_g = rows.source_g[kept_g] * BINS + bin_g[kept_g]
        mse = [np.bincount(place_g, weights, minlength=sources * BINS) for weights in (mse_g[kept_g], None)]
        return np.concatenate(
            [np.stack(ce, -1)[:, None], np.stack(mse, -1).reshape(sources, BINS, 2)], axis=1, dtype=np.float64
        )

    def _reduced(self, table: np.ndarray) -> np.ndarray:
        """Sum over all ranks; rows that several tensor-parallel ranks hold are counted once."""
        if not self.mesh.tp.first:
            table[:, 0] = 0
            table[:, 1:] *= self.config.parallel.row_shards > 1
        found = torch.from_numpy(table).to(current_device())
        dist.all_reduce(found)
        return all_reduced(found).numpy()

    def _losses(self, table: np.ndarray) -> HeldOutLosses:
        means = [[Mean(total, round(count)) for total, count in row] for row in table.tolist()]
        by_source = dict(zip(self._sources, means, strict=False))
        ce = {name: row[0] for name, row in by_source.items()}
        return HeldOutLosses(ce, {name: tuple(row[1:]) for name, row in by_source.items()}, dict(self._sources))


def _bins(pack: Pack, lost: frozenset[str], train: TrainConfig) -> np.ndarray:
    """Return [L] the interval of each latent token's timestep; -1 for clean images and for images that were lost."""
    uses = [(sample.key, image) for sample in pack.samples for image in sample.latents]
    draws = torch.tensor([image.raw_timestep for _, image in uses], dtype=torch.float32)
    time_I = timestep(draws, train.timestep_shift, train.timestep_precision).numpy()
    kept_I = np.array([image.noised and repr((key, image.slot)) not in lost for key, image in uses], bool)
    bin_I = np.where(kept_I, np.minimum((time_I * BINS).astype(np.int64), BINS - 1), -1)
    return bin_I[index_latents(pack).image_L]


def _groups(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield the numbers in groups of at most `size`."""
    left = iter(numbers)
    while group := list(islice(left, size)):
        yield group

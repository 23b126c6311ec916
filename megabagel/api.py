"""Functions of the Python interface: configs, batches, one forward pass, training in-process, checkpoints, metrics.

`import megabagel` re-exports them; docs/python.md shows them at work. Each is a thin call into the rooms, as the
commands are.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabagel.config.load import load
from megabagel.config.schema import Config
from megabagel.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from megabagel.checkpoint.reader import Stored
    from megabagel.model.bagel import Bagel
    from megabagel.model.inputs import Outputs
    from megabagel.sequence.batch import PackedBatch


def load_config(path: str | Path, *overrides: str) -> Config:
    """Read a YAML config, apply `section.key=value` overrides in order, and check everything.

    Raises:
        UserError: one message with a line for each problem.
    """
    return load(path, overrides)


def batches(config: Config, steps: int = 1) -> Iterator["PackedBatch"]:
    """Yield the packed batches of the first `steps` training steps, as one process without other ranks gets them.

    Args:
        config: its data set is drawn or indexed first where that was not done before.
        steps: optimizer steps; each has `train.packs_per_step` batches.

    Raises:
        UserError: as `megabagel train` would.
    """
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.data.load.loader import Loader
    from megabagel.data.plan.global_plan import GlobalPlan
    from megabagel.parallel.attention import choose_attention
    from megabagel.sequence.batch import BatchBuilder
    from megabagel.sequence.rank_rows import RankPlace
    from megabagel.train.build import open_data

    data = open_data(config)
    builder = BatchBuilder(config, RankPlace(), choose_attention(config).plan)
    plan = GlobalPlan(data.sources, config)
    loader = Loader(plan, data.tokenizer, data.decode, config, builder, latents=data.latents)
    for step in loader.steps(steps):
        yield from step.batches


def attention_mask(batch: "PackedBatch") -> "np.ndarray":
    """Return the mask of a batch as bool [S, S]: whether query row s sees key column t, in sequence order.

    Training never builds it: the mask is five integers per token (docs/architecture.md). This is for looking at small
    packs.
    """
    from megabagel_kernels.attention.mask import dense_mask

    return dense_mask(batch.pack.codes)


def forward(model: "Bagel", config: Config, batch: "PackedBatch") -> "Outputs":
    """Return losses per token and velocities of one batch on one device, with gradients where they are enabled.

    Args:
        model: a whole model, built with `SingleDevice`.
        config: the config that made the batch; `parallel` sizes must be 1.
        batch: from `batches`.

    Returns:
        ce_Q: [Q] cross-entropy of each text token that is learned, in nats.
        mse_g: [G] squared velocity error of each latent row, 0 where none is learned.
        velocity_gZ: [G, Z] predicted velocity of each latent row.
    """
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.model.vae import build_codec
    from megabagel.parallel.attention import choose_attention
    from megabagel.parallel.inputs import InputBuilder
    from megabagel.parallel.mesh import single_mesh

    device = next(model.parameters()).device
    codec = build_codec(config.model.vae, device)
    inputs = InputBuilder(config, single_mesh(), codec, device, attention=choose_attention(config)).build(batch)
    outputs = model(inputs)
    assert not hasattr(outputs, "und_uD"), "a pipeline stage without heads has no losses"
    return outputs


def train_steps(config: Config) -> Iterator[dict[str, Any]]:
    """Train as `megabagel train` does, in this process, and yield the record of every step as metrics.jsonl holds it.

    Under torchrun or srun this process is one rank of the job. Checkpoints, metrics and samples are written to
    `run.dir` as usual; a run that is there already is resumed (`run.resume`). Leaving the loop early ends the run after
    the step that was yielded last; steps after the newest checkpoint are then not saved.

    Raises:
        UserError: for a mistake in the config, data or environment.
    """
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.inference.training_samples import training_sampler
    from megabagel.train.run import records

    yield from records(config, sampler=training_sampler)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any grid, opened for reading."""

    folder: Path
    stored: "Stored"

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.stored.manifest.step

    def names(self, kind: str = "weight") -> list[str]:
        """Return the names of all tensors of a kind: weight, ema, exp_avg or exp_avg_sq."""
        return sorted(key.partition("/")[2] for key in self.stored.index if key.startswith(f"{kind}/"))

    def read(self, name: str, kind: str = "weight") -> "torch.Tensor":
        """Return a whole tensor, on the CPU, in the type it is stored in; its bytes have passed their checksums.

        Raises:
            UserError: there is no such tensor, or the file is damaged.
        """
        import torch

        key = f"{kind}/{name}"
        if key not in self.stored:
            known = self.names(kind)
            raise UserError(
                f"{self.folder}: no tensor {key}; expected one of {len(known)} such as {', '.join(known[:3]) or 'none'}"
            )
        return torch.cat(list(self.stored.whole(key).read()))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest checkpoint of a run folder.

    Raises:
        UserError: no complete checkpoint is there.
    """
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.checkpoint.reader import Stored

    folder = Path(path)
    newest = folder / "checkpoints" / "latest"
    if newest.is_file():
        folder = newest.parent / newest.read_text().strip()
    return Checkpoint(folder, Stored(folder))


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return the records of RUN/metrics.jsonl, one per step.

    Raises:
        UserError: there is no such file, or a line of it is no JSON object.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the folder of a run (run.dir) that has finished a step")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is no JSON ({error}); remove it, or train that step again"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is {line[:40]!r}; expected a JSON object")
        records.append(record)
    return records


@dataclass(frozen=True)
class RunDifference:
    """How far two runs are apart in one metric."""

    metric: str
    steps: int
    """Steps that both runs have."""
    first: int | None
    """The first step in which they differ in any bit; None if in none."""
    largest: float
    """Largest relative difference of a step."""


def compare_runs(
    one: str | Path, other: str | Path, metrics: Sequence[str] = ("loss", "loss_ce", "loss_mse", "grad_norm")
) -> list[RunDifference]:
    """Compare two runs step by step.

    Args:
        one: folder of a run.
        other: folder of another.
        metrics: columns of metrics.jsonl to compare.

    Raises:
        UserError: a run has no metrics, or they share no step.
    """
    mine, theirs = ({record["step"]: record for record in read_metrics(run)} for run in (one, other))
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        raise UserError(f"{one} and {other} have no step in common; expected two runs of the same config")
    found = []
    for metric in metrics:
        pairs = [(step, mine[step].get(metric), theirs[step].get(metric)) for step in shared]
        numbers = [(step, a, b) for step, a, b in pairs if a is not None and b is not None]
        apart = [(step, abs(a - b) / max(abs(a), abs(b))) for step, a, b in numbers if a != b]
        first = apart[0][0] if apart else None
        found.append(RunDifference(metric, len(numbers), first, max((gap for _, gap in apart), default=0.0)))
    return found

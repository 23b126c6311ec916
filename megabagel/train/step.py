"""One training step: micro-batches through the pipeline schedule, losses over global token counts, one update."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megabagel.config.schema import Config, TrainConfig
from megabagel.model.inputs import Outputs, StageInputs
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.device import current_device
from megabagel.runtime.phase import all_reduced, phase
from megabagel.sequence.layout import layout_rows
from megabagel.sequence.pack import Pack
from megabagel.sequence.sizes import Size
from megabagel.train.optimizer import Optimizer


@dataclass(frozen=True)
class Counts:
    """Loss-bearing tokens; the denominators of both losses."""

    ce: int
    mse: int


def denominators(config: TrainConfig, micro_steps: Sequence[Sequence[Pack | Size]]) -> list[Counts]:
    """What the summed losses of each micro-step are divided by (docs/bagel.md#losses).

    micro_steps: the packs, or their sizes, that all data-parallel ranks run at the same time, for each turn of a step.
    """
    counts = [Counts(sum(p.ce_tokens for p in packs), sum(p.mse_tokens for p in packs)) for packs in micro_steps]
    if config.loss_normalization == "micro_step":
        return [Counts(c.ce * len(counts), c.mse * len(counts)) for c in counts]
    return [Counts(sum(c.ce for c in counts), sum(c.mse for c in counts))] * len(counts)


@dataclass(frozen=True)
class Losses:
    """Means over the global batch, by the rule of `train.loss_normalization`; 0 where no token bears the loss."""

    ce: float
    mse: float
    total: float
    sums: torch.Tensor
    """fp64 [micro-steps, 2, sources + 1]: summed cross-entropy and flow loss by data source; the last is no source."""


Weighed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def weigh(outputs: Outputs, inputs: StageInputs, counts: Counts, config: Config) -> Weighed:
    """This micro-batch's share of the step's loss: weighted sums over the denominators `counts`.

    Returns (loss, rows counted by megatron-core, which we leave at 0, fp64 sums [2, sources + 1] for the log).
    """
    train, sources = config.train, len(config.data.sources) + 1
    ce, mse = outputs.ce_Q.sum(), outputs.mse_g.sum()
    loss = train.ce_weight * ce / max(counts.ce, 1) + train.mse_weight * mse / max(counts.mse, 1)
    sums = torch.stack([
        _by_source(outputs.ce_Q.detach(), inputs.source_Q, sources),
        _by_source(outputs.mse_g.detach(), inputs.source_g, sources),
    ])  # fmt: skip
    return loss, torch.zeros((), dtype=torch.int, device=ce.device), sums


def _by_source(loss_T: torch.Tensor, source_T: torch.Tensor, sources: int) -> torch.Tensor:
    """Sums [sources] in fp64, in an order that does not vary."""
    return loss_T.double() @ torch.nn.functional.one_hot(source_T, sources).double()


Fed = tuple[StageInputs, Counts]
"""A micro-batch and the denominators of its losses."""


class StepRunner:
    """Runs the schedule of the grid over this rank's model chunks."""

    def __init__(self, config: Config, mesh: Mesh, optimizer: Optimizer) -> None:
        self.config, self.mesh, self.optimizer = config, mesh, optimizer
        grid = config.parallel
        self.rows = layout_rows(config.data.max_tokens, grid.chunk, grid.cp)

    def train(
        self, micro_batches: Sequence[StageInputs], counts: Sequence[Counts], learning_rate: float
    ) -> tuple[Losses, float]:
        """Forward, backward and update; returns (losses of the global batch, gradient norm), equal on all ranks.

        counts: the denominators of each micro-batch.
        """
        losses = self.backward(micro_batches, counts)
        return losses, self.optimizer.step(learning_rate)

    def backward(self, micro_batches: Sequence[StageInputs], counts: Sequence[Counts]) -> Losses:
        """Forward and backward: fresh gradients, summed over ranks, and the losses of the global batch."""
        self.optimizer.zero_grad()
        feed = list(zip(micro_batches, counts, strict=True))
        sums = self._schedule(feed, partial(weigh, config=self.config), forward_only=False)
        return self._reduce(sums, counts)

    def losses(self, micro_batches: Sequence[StageInputs], counts: Sequence[Counts]) -> Losses:
        """Forward alone: the losses of the global batch."""
        feed = list(zip(micro_batches, counts, strict=True))
        with torch.no_grad():
            sums = self._schedule(feed, partial(weigh, config=self.config), forward_only=True)
        return self._reduce(sums, counts)

    def evaluate(self, inputs: StageInputs) -> Outputs | None:
        """One micro-batch forward without gradients; the outputs on the last stage, None elsewhere."""
        feed = [(inputs, Counts(1, 1))] * self.fewest_micro_batches
        with torch.no_grad():
            found = self._schedule(feed, _as_it_is, forward_only=True, collect_non_loss_data=True)
        return found[0] if found else None

    @property
    def fewest_micro_batches(self) -> int:
        """The interleaved schedule wants a multiple of the pipeline's length."""
        return self.mesh.pp.size if self.config.parallel.vpp > 1 else 1

    def _schedule(self, micro_batches: Sequence[Fed], loss_func: Any, **options: Any) -> list[Any]:
        def forward_step(feed: Iterator[Fed], model: Any) -> tuple[Any, Any]:
            inputs, counts = next(feed)
            with phase("forward"):
                outputs = model(inputs)
            return outputs, partial(loss_func, inputs=inputs, counts=counts)

        chunks = self.optimizer.chunks
        feeds = [iter(micro_batches) for _ in chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=feeds if len(chunks) > 1 else feeds[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=self.rows,
            micro_batch_size=1,
            **options,
        )

    def _reduce(self, sums: list[torch.Tensor], counts: Sequence[Counts]) -> Losses:
        """Add up what the last stages found. Rows are split over tensor-parallel ranks, or else counted once."""
        grid, config = self.mesh, self.config.train
        sources = len(self.config.data.sources) + 1
        found = torch.zeros(len(counts), 2, sources, dtype=torch.float64, device=current_device())
        if grid.pp.last:
            found += torch.stack(sums)
        if not grid.tp.first:
            found[:, 0] = 0
            found[:, 1] *= self.config.parallel.row_shards > 1
        with phase("losses"):
            dist.all_reduce(found)
            summed = all_reduced(found.sum(2))
        divided = summed / torch.tensor([[max(c.ce, 1), max(c.mse, 1)] for c in counts])
        ce, mse = divided.sum(0).tolist()
        return Losses(ce, mse, config.ce_weight * ce + config.mse_weight * mse, found.cpu())


def _as_it_is(outputs: Outputs, **_: object) -> Outputs:
    return outputs

"""One training step: micro-batches through the pipeline schedule, losses over global token counts, one update."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megabagel.config.schema import Config
from megabagel.model.inputs import Outputs, StageInputs
from megabagel.parallel import host
from megabagel.parallel.topology import Topology
from megabagel.sequence.layout import layout_rows
from megabagel.train.optimizer import Optimizer


@dataclass(frozen=True)
class Counts:
    """Loss-bearing tokens of the whole global batch; the denominators of both losses."""

    ce: int
    mse: int


@dataclass(frozen=True)
class Losses:
    """Means over the global batch; 0 where no token bears the loss."""

    ce: float
    mse: float
    total: float
    ce_sums: tuple[float, ...] = ()
    mse_sums: tuple[float, ...] = ()
    """Sums of both losses by data source, for the log."""


Weighed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def weigh(outputs: Outputs, inputs: StageInputs, counts: Counts, config: Config) -> Weighed:
    """This micro-batch's share of the global loss: weighted sums over global counts (bagel-reference section 10).

    Returns (loss, rows counted by megatron-core, which we leave at 0, fp64 sums [2, sources + 1] for the log).
    """
    train, sources = config.train, len(config.data.sources) + 1
    ce, mse = outputs.ce_K.sum(), outputs.mse_g.sum()
    loss = train.ce_weight * ce / max(counts.ce, 1) + train.mse_weight * mse / max(counts.mse, 1)
    sums = torch.stack([
        _by_source(outputs.ce_K.detach(), inputs.source_K, sources),
        _by_source(outputs.mse_g.detach(), inputs.source_g, sources),
    ])  # fmt: skip
    return loss, torch.zeros((), dtype=torch.int, device=ce.device), sums


def _by_source(loss_T: torch.Tensor, source_T: torch.Tensor, sources: int) -> torch.Tensor:
    """Sums [sources] in fp64, in an order that does not vary."""
    return loss_T.double() @ torch.nn.functional.one_hot(source_T, sources).double()


class StepRunner:
    """Runs the schedule of the grid over this rank's model chunks."""

    def __init__(self, config: Config, topology: Topology, optimizer: Optimizer) -> None:
        self.config, self.topology, self.optimizer = config, topology, optimizer
        grid = config.parallel
        self.rows = layout_rows(config.data.max_tokens, grid.chunk, grid.cp)
        self.rows_split = grid.sp and grid.tp > 1

    def train(self, micro_batches: Sequence[StageInputs], counts: Counts, learning_rate: float) -> tuple[Losses, float]:
        """Forward, backward and update; returns (losses of the global batch, gradient norm), equal on all ranks."""
        self.optimizer.zero_grad()
        sums = self._schedule(micro_batches, partial(weigh, counts=counts, config=self.config), forward_only=False)
        norm = self.optimizer.step(learning_rate)
        return self._reduce(sums, counts), norm

    def evaluate(self, inputs: StageInputs) -> Outputs | None:
        """One micro-batch forward without gradients; the outputs on the last stage, None elsewhere."""
        interleaved = self.config.parallel.vpp > 1  # whose schedule wants a multiple of the pipeline's length
        copies = self.topology.pp.size if interleaved else 1
        with torch.no_grad():
            found = self._schedule([inputs] * copies, _as_it_is, forward_only=True, collect_non_loss_data=True)
        return found[0] if found else None

    def _schedule(self, micro_batches: Sequence[StageInputs], loss_func: Any, **options: Any) -> list[Any]:
        def forward_step(feed: Iterator[StageInputs], model: Any) -> tuple[Any, Any]:
            inputs = next(feed)
            return model(inputs), partial(loss_func, inputs=inputs)

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

    def _reduce(self, sums: list[torch.Tensor], counts: Counts) -> Losses:
        """Add up what the last stages found. Rows are split over tensor-parallel ranks, or else counted once."""
        grid, config = self.topology, self.config.train
        found = torch.zeros(2, len(self.config.data.sources) + 1, dtype=torch.float64, device=host.device())
        for entry in sums if grid.pp.last else []:
            found += entry
        if not grid.tp.first:
            found[0] = 0
            found[1] *= self.rows_split
        dist.all_reduce(found)
        ce, mse = (float(row.sum()) / max(n, 1) for row, n in zip(found, (counts.ce, counts.mse), strict=True))
        total = config.ce_weight * ce + config.mse_weight * mse
        return Losses(ce, mse, total, *(tuple(row.tolist()) for row in found))


def _as_it_is(outputs: Outputs, **_: object) -> Outputs:
    return outputs

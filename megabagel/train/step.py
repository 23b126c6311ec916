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


def weigh(outputs: Outputs, counts: Counts, config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """This micro-batch's share of the global loss: weighted sums over global counts (bagel-reference section 10).

    Returns (loss, rows counted by megatron-core, which we leave at 0, sums for the log).
    """
    ce, mse = outputs.ce_K.sum(), outputs.mse_g.sum()
    loss = config.ce_weight * ce / max(counts.ce, 1) + config.mse_weight * mse / max(counts.mse, 1)
    sums = {"ce": ce.detach(), "mse": mse.detach()}
    return loss, torch.zeros((), dtype=torch.int, device=ce.device), sums


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
        sums = self._schedule(
            micro_batches, partial(weigh, counts=counts, config=self.config.train), forward_only=False
        )
        norm = self.optimizer.step(learning_rate)
        return self._reduce(sums, counts), norm

    def evaluate(self, inputs: StageInputs) -> Outputs | None:
        """One micro-batch forward without gradients; the outputs on the last stage, None elsewhere."""
        interleaved = self.config.parallel.vpp > 1  # whose schedule wants a multiple of the pipeline's length
        with torch.no_grad():
            found = self._schedule(
                [inputs] * (self.topology.pp.size if interleaved else 1),
                lambda outputs, **_: outputs,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return found[0] if found else None

    def _schedule(self, micro_batches: Sequence[StageInputs], loss_func: Any, **options: Any) -> list[Any]:
        def forward_step(feed: Iterator[StageInputs], model: Any) -> tuple[Any, Any]:
            return model(next(feed)), loss_func

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

    def _reduce(self, sums: list[dict[str, torch.Tensor]], counts: Counts) -> Losses:
        """Add up what the last stages found. Rows are split over tensor-parallel ranks, or else counted once."""
        grid, config = self.topology, self.config.train
        mine = torch.zeros(2, dtype=torch.float64)
        for entry in sums if grid.pp.last else []:
            mine[0] += float(entry["ce"]) if grid.tp.first else 0.0
            mine[1] += float(entry["mse"]) if grid.tp.first or self.rows_split else 0.0
        mine = mine.to(next(self.optimizer.chunks[0].parameters()).device)
        dist.all_reduce(mine)
        ce, mse = (float(total) / max(count, 1) for total, count in zip(mine, (counts.ce, counts.mse), strict=True))
        return Losses(ce, mse, config.ce_weight * ce + config.mse_weight * mse)

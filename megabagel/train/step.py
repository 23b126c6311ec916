"""One training step: micro-batches through the pipeline schedule, and losses over global token counts."""

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
    """Numbers of tokens with a loss: the denominators of cross-entropy and of the flow loss."""

    ce: int
    mse: int


def denominators(config: TrainConfig, micro_steps: Sequence[Sequence[Pack | Size]]) -> list[Counts]:
    """Return the denominators of the summed losses, one per micro-step (docs/bagel.md#losses).

    With `train.loss_normalization=micro_step` each micro-step has its own mean, and the step averages them; otherwise
    all micro-steps divide by the counts of the whole step.

    Args:
        micro_steps: for each micro-step, the packs (or their sizes) that all data-parallel ranks run at the same time.
    """
    counts = [Counts(sum(p.ce_tokens for p in packs), sum(p.mse_tokens for p in packs)) for packs in micro_steps]
    if config.loss_normalization == "micro_step":
        return [Counts(c.ce * len(counts), c.mse * len(counts)) for c in counts]
    return [Counts(sum(c.ce for c in counts), sum(c.mse for c in counts))] * len(counts)


@dataclass(frozen=True)
class Losses:
    """Mean losses over the global batch, by the rule of `train.loss_normalization`; 0 where no token has the loss."""

    ce: float
    mse: float
    total: float
    sums: torch.Tensor
    """fp64 [micro-steps, 2, sources + 1]: summed cross-entropy and flow loss by data source; the last column is for
    rows without a source."""


Weighed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(loss to differentiate, token count for megatron-core, fp64 sums [2, sources + 1] for the log)."""


def weigh(outputs: Outputs, inputs: StageInputs, counts: Counts, config: Config) -> Weighed:
    """Return this micro-batch's share of the step's loss: weighted sums over the denominators `counts`.

    Args:
        outputs: of the last pipeline stage: `ce_Q` per row with cross-entropy, `mse_g` per row of the generation
            expert.
        inputs: of the same micro-batch, for the data source of each row.
        counts: denominators over all data-parallel ranks, from `denominators`.
        config: the weights of the two losses and the number of sources.

    Returns:
        (scalar loss; int 0; fp64 sums [2, sources + 1]). megatron-core's schedule takes a token count second, for
        `finalize_model_grads_func` to divide by (`calculate_per_token_loss`); the loss is divided here already, so the
        count stays 0.
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
    """Return the sums [sources] in fp64.

    A product with one-hot rows, because `index_add_` on a GPU adds in varying order.
    """
    return loss_T.double() @ torch.nn.functional.one_hot(source_T, sources).double()


Fed = tuple[StageInputs, Counts]
"""A micro-batch and the denominators of its losses."""


class ForwardRunner:
    """Runs the pipeline schedule of the grid over this rank's model chunks, without gradients."""

    def __init__(self, config: Config, mesh: Mesh, chunks: Sequence[Any]) -> None:
        """`chunks`: `PipelineStage`s, or megatron-core's wrappers around them."""
        self.config, self.mesh, self.chunks = config, mesh, list(chunks)
        grid = config.parallel
        self.rows = layout_rows(config.data.max_tokens, grid.chunk, grid.cp)

    def evaluate(self, inputs: StageInputs) -> Outputs | None:
        """Run one micro-batch forward without gradients; returns the outputs on the last stage, None elsewhere."""
        return next(iter(self.outputs([inputs])), None)

    def outputs(self, micro_batches: Sequence[StageInputs]) -> list[Outputs]:
        """Run micro-batches forward without gradients; returns their outputs on the last stage, nothing elsewhere."""
        # The last micro-batch is repeated until the schedule has as many as it demands; those results are dropped.
        missing = -len(micro_batches) % self.fewest_micro_batches
        feed = [*micro_batches, *[micro_batches[-1]] * missing]
        with torch.no_grad():
            found = self._schedule(
                feed, [Counts(1, 1)] * len(feed), _as_it_is, forward_only=True, collect_non_loss_data=True
            )
        return found[: len(micro_batches)]

    @property
    def fewest_micro_batches(self) -> int:
        """Fewest micro-batches of a step: the interleaved schedule takes multiples of the pipeline size."""
        return self.mesh.pp.size if self.config.parallel.vpp > 1 else 1

    def _schedule(
        self, micro_batches: Sequence[StageInputs], counts: Sequence[Counts], loss_func: Any, **options: Any
    ) -> list[Any]:
        """Run megatron-core's schedule; returns what `loss_func` collected on the last stage, per micro-batch."""

        def forward_step(feed: Iterator[Fed], model: Any) -> tuple[Any, Any]:
            inputs, counts = next(feed)
            with phase("forward"):
                outputs = model(inputs)
            return outputs, partial(loss_func, inputs=inputs, counts=counts)

        # Each model chunk of the interleaved schedule walks over the micro-batches by itself. Lazily: `InputFeed`
        # builds a micro-batch when it is reached.
        feeds = [zip(micro_batches, counts, strict=True) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=feeds if len(feeds) > 1 else feeds[0],
            model=self.chunks if len(feeds) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=self.rows,
            micro_batch_size=1,
            **options,
        )


class StepRunner(ForwardRunner):
    """Runs training steps over this rank's model chunks and their optimizer."""

    def __init__(self, config: Config, mesh: Mesh, optimizer: Optimizer) -> None:
        super().__init__(config, mesh, optimizer.chunks)
        self.optimizer = optimizer

    def train(
        self, micro_batches: Sequence[StageInputs], counts: Sequence[Counts], learning_rate: float
    ) -> tuple[Losses, float]:
        """Run forward, backward and update; returns (losses of the global batch, gradient norm), equal on all ranks.

        Args:
            micro_batches: this rank's micro-batches of the step.
            counts: the denominators of each micro-batch.
            learning_rate: of this step.
        """
        losses = self.backward(micro_batches, counts)
        return losses, self.optimizer.step(learning_rate)

    def backward(self, micro_batches: Sequence[StageInputs], counts: Sequence[Counts]) -> Losses:
        """Run forward and backward: fills the reduced gradients and returns the losses of the global batch."""
        self.optimizer.zero_grad()
        sums = self._schedule(micro_batches, counts, partial(weigh, config=self.config), forward_only=False)
        return self._reduce(sums, counts)

    def unreduced(self, micro_batches: Sequence[StageInputs], counts: Sequence[Counts]) -> list[torch.Tensor]:
        """Run forward and backward without any reduction; returns the loss sums that this rank has.

        The gradient buffers then hold the gradients of this rank alone.
        """
        self.optimizer.zero_grad()
        megatron = self.optimizer.chunks[0].config
        finish, megatron.finalize_model_grads_func = megatron.finalize_model_grads_func, None
        try:
            return self._schedule(micro_batches, counts, partial(weigh, config=self.config), forward_only=False)
        finally:
            megatron.finalize_model_grads_func = finish

    def losses(self, micro_batches: Sequence[StageInputs], counts: Sequence[Counts]) -> Losses:
        """Run forward only; returns the losses of the global batch."""
        with torch.no_grad():
            sums = self._schedule(micro_batches, counts, partial(weigh, config=self.config), forward_only=True)
        return self._reduce(sums, counts)

    def _reduce(self, sums: list[torch.Tensor], counts: Sequence[Counts]) -> Losses:
        """Sum the losses that the last stages computed over all ranks.

        Under sequence parallelism the flow loss is split over tensor-parallel ranks by rows; cross-entropy, and the
        flow loss without sequence parallelism, are equal on all of them and counted once.
        """
        grid, config = self.mesh, self.config.train
        sources = len(self.config.data.sources) + 1
        found = torch.zeros(len(counts), 2, sources, dtype=torch.float64, device=current_device())
        if grid.pp.last:
            found += torch.stack(sums)
        if not grid.tp.first:
            found[:, 0] = 0
            found[:, 1] *= self.config.parallel.row_shards > 1
        with phase("losses"):
            # Over the default group: ranks of other stages add zeros, and every rank gets the sums without a second
            # broadcast.
            dist.all_reduce(found)
            summed = all_reduced(found.sum(2))
        divided = summed / torch.tensor([[max(c.ce, 1), max(c.mse, 1)] for c in counts])
        ce, mse = divided.sum(0).tolist()
        return Losses(ce, mse, config.ce_weight * ce + config.mse_weight * mse, found.cpu())


def _as_it_is(outputs: Outputs, **_: object) -> Outputs:
    """Return the outputs unchanged: `collect_non_loss_data` makes the schedule hand them back."""
    return outputs

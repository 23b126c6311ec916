"""Optimizer of one rank: megatron-core's DDP and distributed optimizer, and an exponential moving average (EMA).

Every data-parallel rank owns a flat shard of the fp32 weights, moments and averaged weights (ZeRO-1). Recipe and EMA:
docs/bagel.md#optimizer, docs/bagel.md#ema.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megabagel.config.schema import TrainConfig
from megabagel.parallel.mesh import Axis, Mesh
from megabagel.parallel.stages import PipelineStage
from megabagel.runtime.device import current_device
from megabagel.runtime.phase import phase
from megabagel.runtime.rank_clock import clock
from megabagel.train.gradients import clip_gradients, gradient_norm


class Optimizer:
    """AdamW with gradient clipping over this rank's model chunks, and the EMA of the weights."""

    def __init__(
        self, config: TrainConfig, megatron: TransformerConfig, stages: list[PipelineStage], mesh: Mesh
    ) -> None:
        """Wrap the model chunks in DDP and build the optimizer over them.

        Args:
            config: optimizer settings, freeze list aside: frozen weights have `requires_grad=False` already.
            megatron: of the model chunks; its `finalize_model_grads_func` is set to `finish_gradients`.
            stages: this rank's model chunks, several with interleaved pipeline stages.
            mesh: process groups of the job.
        """
        self.config = config
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
        )
        self.chunks = [DistributedDataParallel(megatron, ddp, stage) for stage in stages]
        chained: Any = get_megatron_optimizer(
            _optimizer_config(config, megatron), self.chunks, use_gloo_process_groups=False
        )
        # megatron-core wraps several optimizers (dense, experts) in a ChainedOptimizer; this model has exactly one
        # inside.
        (self.distributed,) = getattr(chained, "chained_optimizers", [chained])
        self._chained = chained
        self._fuse()
        self._allocate_moments()
        self.ema = {shard: shard.detach().clone() for shard in self.shards()} if config.ema else {}
        # megatron-core's own function also all-reduces embedding and layer-norm gradients by rules of GPT models.
        megatron.finalize_model_grads_func = lambda chunks, *_, **__: finish_gradients(chunks, mesh.tp)

    def shards(self) -> list[torch.Tensor]:
        """Return this rank's fp32 weight shards, flat, in a fixed order."""
        return [shard for group in self.inner.param_groups for shard in group["params"]]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The AdamW that holds the moments."""
        return self.distributed.optimizer

    def _allocate_moments(self) -> None:
        """Create the moments now rather than in the first step: a checkpoint may be saved or loaded before it."""
        for shard in self.shards():
            zeros = {kind: torch.zeros_like(shard) for kind in ("exp_avg", "exp_avg_sq")}
            # Where torch's own AdamW puts it: the fused kernel reads the count on the device of the weights.
            count = {"step": torch.zeros((), device=shard.device)} if self._counts_per_shard else {}
            self.inner.state[shard] = {**count, **zeros}

    @property
    def _counts_per_shard(self) -> bool:
        """Whether steps are counted per parameter (torch's AdamW) or per group (fused GPU optimizers)."""
        return isinstance(self.inner, torch.optim.AdamW)

    def _fuse(self) -> None:
        """Use torch's fused AdamW where Transformer Engine and Apex give none: one pass over weights and moments.

        The alternative on a GPU takes three times the memory traffic and temporaries of the shards' size; on a CPU it
        takes MKL's square roots, whose last bits differ between processors.
        """
        for group in self.inner.param_groups:
            if self._counts_per_shard:
                group["fused"], group["foreach"] = True, False

    def after_load(self, step: int) -> None:
        """Finish a load that filled weights, moments and averages in place.

        Args:
            step: number of updates made so far, for AdamW's bias correction.
        """
        for group in self.inner.param_groups:
            if not self._counts_per_shard:
                group["step"] = step
            for shard in group["params"] if self._counts_per_shard else ():
                self.inner.state[shard]["step"].fill_(step)
        self._publish()

    def _publish(self) -> None:
        """Copy the fp32 shards, which were written in place, to the model weights of all ranks."""
        # A private of megatron-core: its public load_state_dict takes a state dict.
        self.distributed._copy_main_params_to_model_params()
        for chunk in self.chunks:
            # Each rank wrote its own shard of the model weights only: gather the others'.
            chunk.start_param_sync(force_sync=True)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Hold the averaged weights in the model inside the block, and the trained ones again after it, bit for bit.

        Without averages (train.ema=0) and for frozen weights nothing changes. Collective.
        """
        if not self.ema:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange weights and averages."""
        # Shard by shard: a copy of all weights at once would be as large as the averages.
        for shard, average in self.ema.items():
            weight = shard.detach().clone()
            shard.copy_(average)
            average.copy_(weight)
        self._publish()

    def start_averages(self) -> None:
        """Set the averaged weights to the current weights."""
        for shard, average in self.ema.items():
            average.copy_(shard.detach())

    def zero_grad(self) -> None:
        """Clear the gradients before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self._chained.zero_grad()

    def step(self, learning_rate: float) -> float:
        """Clip and update with the current gradients; returns their global L2 norm before clipping."""
        norm = self.gradient_norm()
        self.update(learning_rate, norm)
        return norm

    def gradient_norm(self) -> float:
        """Return the global L2 norm of the current gradients, equal on all ranks. Changes no weight and no moment."""
        self._chained.prepare_grads()
        return gradient_norm(
            self.distributed.get_main_grads_for_grad_norm(),
            self.distributed.get_grad_stats_parallel_group(),
            current_device(),
        )

    @torch.no_grad()
    def update(self, learning_rate: float, norm: float) -> None:
        """Clip by `norm`, then update weights, moments and averaged weights.

        Args:
            learning_rate: of this step.
            norm: global gradient norm from `gradient_norm`; computing it a second time would cost another all-reduce.
        """
        for group in self._chained.param_groups:
            group["lr"] = learning_rate
        found = [p.grad for p in self.distributed.get_parameters() if p.grad is not None]
        clip_gradients(found, self.config.clip, norm)
        self._chained.step_with_ready_grads()
        if self.ema:
            torch._foreach_lerp_(list(self.ema.values()), list(self.ema), 1 - self.config.ema)


def _optimizer_config(config: TrainConfig, megatron: TransformerConfig) -> OptimizerConfig:
    """Return megatron-core's optimizer settings."""
    return OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip,
        bf16=megatron.bf16,
        params_dtype=megatron.params_dtype,
        use_distributed_optimizer=True,
    )


def finish_gradients(chunks: list[DistributedDataParallel], tp: Axis) -> None:
    """Reduce gradients over data- and context-parallel ranks, then partial ones over tensor-parallel ranks."""
    # From here on every rank waits for the others.
    clock.pause()
    with phase("gradients"):
        for chunk in chunks:
            chunk.finish_grad_sync()
        if tp.size > 1:
            _sum_partial(chunks, tp)


def _sum_partial(chunks: list[DistributedDataParallel], tp: Axis) -> None:
    """Sum the gradients of replicated weights that only some of the rows reached on each tensor-parallel rank.

    They are concatenated: one all-reduce rather than one per weight.
    """
    partial = [
        parameter.main_grad  # type: ignore[attr-defined]
        for chunk in chunks
        for parameter in chunk.parameters()
        if parameter.requires_grad and getattr(parameter, "partial_over_tp", False)
    ]
    if partial:
        flat = torch.cat([gradient.flatten() for gradient in partial])
        dist.all_reduce(flat, group=tp.group)
        for gradient, total in zip(partial, flat.split([g.numel() for g in partial]), strict=True):
            gradient.copy_(total.view_as(gradient))

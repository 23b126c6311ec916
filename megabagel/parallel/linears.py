"""Layer factory of megatron-core's tensor- and sequence-parallel linears (see `model.factory`)."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megabagel_kernels.linear_cross_entropy import VocabShard
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megabagel.model.kernels import TORCH, Kernels, TokenLoss
from megabagel.model.sharding import shard
from megabagel.parallel.mesh import Axis, Mesh

M = TypeVar("M", bound=nn.Module)


class MegatronLayers:
    """Layer factory that splits linears, embedding and head over the tensor-parallel axis of a mesh."""

    def __init__(self, config: TransformerConfig, mesh: Mesh, kernels: Kernels = TORCH) -> None:
        self.config, self.tp, self.kernels = config, mesh.tp, kernels
        self.rows_are_split = config.sequence_parallel
        # megatron-core's linears read sequence parallelism from their config. ViT, connector and head run on rows that
        # are not split and get this one.
        self.whole_rows = replace(config, sequence_parallel=False)

    @property
    def shards(self) -> int:
        """Tensor-parallel size."""
        return self.tp.size

    def column(self, inputs: int, blocks: Mapping[str, int], *, bias: bool, rows_split: bool) -> nn.Module:
        """Build a column-parallel linear, whose output holds this rank's share of every block, side by side.

        Args:
            inputs: input width.
            blocks: full output width of each named block, for example q, k and v.
            bias: whether the linear has a bias.
            rows_split: whether to gather the input's rows under sequence parallelism.
        """
        linear = _Column(
            inputs,
            sum(blocks.values()),
            config=self.config if rows_split and self.rows_are_split else self.whole_rows,
            init_method=_left_uninitialized,
            bias=bias,
            tp_group=self.tp.group,
        )
        self._shard(linear.weight, 0, blocks)
        if bias:
            self._shard(linear.bias, 0, blocks)
        return linear

    def row(self, inputs: int, outputs: int, *, bias: bool, rows_split: bool) -> nn.Module:
        """Build a row-parallel linear, which sums its output over ranks.

        Args:
            inputs: full input width.
            outputs: output width.
            bias: whether the linear has a bias.
            rows_split: whether to reduce-scatter the output's rows under sequence parallelism instead of reducing all.
        """
        linear = _Row(
            inputs,
            outputs,
            config=self.config if rows_split and self.rows_are_split else self.whole_rows,
            init_method=_left_uninitialized,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=self.tp.group,
        )
        self._shard(linear.weight, 1, {"": inputs})
        return linear

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """Build a vocabulary-parallel embedding."""
        table = VocabParallelEmbedding(
            vocabulary, width, init_method=_left_uninitialized, config=self.config, tp_group=self.tp.group
        )
        self._shard(table.weight, 0, {"": vocabulary})
        return table

    def head(self, width: int, vocabulary: int) -> nn.Module:
        """Build a vocabulary-parallel linear with cross-entropy."""
        head = _Head(
            self.kernels.token_loss,
            self.tp,
            width,
            vocabulary,
            config=self.whole_rows,
            init_method=_left_uninitialized,
            bias=False,
            # Under sequence parallelism the backward of join_rows reduces and scatters in one collective. Without this,
            # the gradient of the hidden states would be summed twice.
            disable_grad_reduce=self.rows_are_split,
            tp_group=self.tp.group,
        )
        self._shard(head.weight, 0, {"": vocabulary})
        return head

    def split_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the rows under sequence parallelism; backward gathers."""
        return scatter_to_sequence_parallel_region(x, group=self.tp.group) if self.rows_are_split else x

    def join_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Gather all rows under sequence parallelism; backward reduce-scatters the partial gradients."""
        if not self.rows_are_split:
            return x
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.tp.group)

    def partial_over_rows(self, module: M) -> M:
        """Mark weights whose gradients the optimizer sums over tensor-parallel ranks if rows are split."""
        return _mark_partial(module) if self.rows_are_split else module

    def partial_over_heads(self, module: M) -> M:
        """Mark weights (QK-norm) whose gradients the optimizer always sums over tensor-parallel ranks."""
        return _mark_partial(module) if self.tp.size > 1 else module

    def _shard(self, parameter: nn.Parameter, dim: int, blocks: Mapping[str, int]) -> None:
        shard(parameter, dim, blocks, self.tp.rank, self.tp.size)
        # With `perform_initialization=False` megatron-core does not set its own attributes on every weight. Without
        # them its gradient norm would take the parameter for a replicated one and count one rank only.
        if not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)


class _Column(ColumnParallelLinear):
    """ColumnParallelLinear whose forward returns the output alone, not (output, bias)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class _Row(RowParallelLinear):
    """RowParallelLinear whose forward returns the output alone, not (output, bias)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class _Head(ColumnParallelLinear):
    """Language-model head with cross-entropy per row, over a vocabulary that is split over tensor-parallel ranks."""

    def __init__(self, token_loss: TokenLoss | None, tp: Axis, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.token_loss, self.sums_hidden = token_loss, not options["disable_grad_reduce"]
        all_max, all_sum = (partial(_reduced, axis=tp, op=op) for op in (dist.ReduceOp.MAX, dist.ReduceOp.SUM))
        self.shard = VocabShard(tp.rank * len(self.weight), all_max, all_sum)

    def forward(self, hidden_QD: torch.Tensor, label_Q: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if self.token_loss is not None:
            # The fused loss bypasses ColumnParallelLinear.forward and with it the all-reduce of the input's gradient,
            # which this identity with an all-reduce backward replaces (join_rows does it under sequence parallelism).
            if self.sums_hidden:
                hidden_QD = copy_to_tensor_model_parallel_region(hidden_QD, group=self.tp_group)
            return self.token_loss(hidden_QD, self.weight, label_Q, shard=self.shard)
        logits = super().forward(hidden_QD)[0]
        return vocab_parallel_cross_entropy(logits.float(), label_Q)

    def logits(self, hidden_QD: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [Q, vocabulary] of [Q, D] on every rank, gathered from each rank's columns."""
        return gather_from_tensor_model_parallel_region(super().forward(hidden_QD)[0].float(), group=self.tp_group)


def _reduced(x: torch.Tensor, axis: Axis, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """Return the element-wise reduction of `x` over the ranks of an axis, without gradient."""
    if axis.size == 1:
        return x
    # all_reduce works in place; the argument belongs to the caller.
    x = x.clone()
    dist.all_reduce(x, op, group=axis.group)
    return x


def _left_uninitialized(weight: torch.Tensor) -> None:
    """Leave a weight unfilled: `model.init_weights` fills it, keyed by name, so that it does not depend on the grid."""


def _mark_partial(module: M) -> M:
    for parameter in module.parameters():
        parameter.partial_over_tp = True  # type: ignore[attr-defined]
    return module

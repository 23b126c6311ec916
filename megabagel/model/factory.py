"""Layer factory: the interface through which the model gets its linears, embedding, head and row exchanges.

The model itself contains no parallelism. `SingleDevice` builds plain torch modules; `parallel.linears.MegatronLayers`
builds megatron-core's tensor-parallel ones.

Shape letters: docs/notation.md. Rows are tokens; under sequence parallelism each tensor-parallel rank holds 1/tp of
them between the linears.
"""

from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from megabagel_kernels.linear_cross_entropy import WHOLE
from torch import nn
from torch.nn import functional

from megabagel.model.kernels import TORCH, Kernels, TokenLoss
from megabagel.model.sharding import shard

M = TypeVar("M", bound=nn.Module)


class LayerFactory(Protocol):
    """Builder of the parts that depend on tensor and sequence parallelism.

    "Shards" are tensor-parallel ranks, "split rows" the rows of sequence parallelism.
    """

    @property
    def kernels(self) -> Kernels:
        """The run's implementation of norms, RoPE, SwiGLU, noise and losses."""
        ...

    @property
    def shards(self) -> int:
        """Tensor-parallel size: number of parts that heads, MLP width and vocabulary are split into."""
        ...

    def column(self, inputs: int, blocks: Mapping[str, int], *, bias: bool, rows_split: bool) -> nn.Module:
        """Build a column-parallel linear [T, inputs] -> [T', outputs / shards].

        Args:
            inputs: input width.
            blocks: full output width of each named block (q, k, v; gate, up). Blocks lie side by side in the output,
                each split over the shards by itself.
            bias: whether the linear has a bias.
            rows_split: whether the input holds this rank's share of the rows under sequence parallelism; the output
                holds all of them.
        """
        ...

    def row(self, inputs: int, outputs: int, *, bias: bool, rows_split: bool) -> nn.Module:
        """Build a row-parallel linear [T, inputs / shards] -> [T', outputs], summed over shards.

        Args:
            inputs: full input width.
            outputs: output width.
            bias: whether the linear has a bias.
            rows_split: whether the output holds only this rank's share of the rows under sequence parallelism.
        """
        ...

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """Build the token embedding: ids [T] -> [T, width], the same result on all shards."""
        ...

    def head(self, width: int, vocabulary: int) -> nn.Module:
        """Build the language-model head: (hidden [T, width], labels [T]) -> fp32 cross-entropy per row [T].

        The vocabulary is split over shards. The module's method `logits` returns fp32 logits [T, vocabulary] of hidden
        [T, width], complete on every shard.
        """
        ...

    def split_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of rows that are equal on all shards (differentiable)."""
        ...

    def join_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return all rows, gathered from every rank's share, as input of `head` (differentiable)."""
        ...

    def partial_over_rows(self, module: M) -> M:
        """Mark weights that act on split rows: under sequence parallelism each shard has a part of their gradient."""
        ...

    def partial_over_heads(self, module: M) -> M:
        """Mark weights that act on split heads: each shard has a part of their gradient, to be summed by the caller."""
        ...


class SingleDevice:
    """Factory without parallelism: plain torch modules for one device."""

    shards = 1

    def __init__(self, kernels: Kernels = TORCH) -> None:
        self.kernels = kernels

    def column(self, inputs: int, blocks: Mapping[str, int], *, bias: bool, rows_split: bool) -> nn.Module:
        """Build a linear.

        Args:
            inputs: input width.
            blocks: output width of each named block.
            bias: whether the linear has a bias.
            rows_split: without effect.
        """
        linear = nn.Linear(inputs, sum(blocks.values()), bias=bias)
        # Described as one shard, so that checkpoints name q, k and v separately here as on any grid.
        for parameter in linear.parameters():
            shard(parameter, 0, blocks)
        return linear

    def row(self, inputs: int, outputs: int, *, bias: bool, rows_split: bool) -> nn.Module:
        """Build a linear.

        Args:
            inputs: input width.
            outputs: output width.
            bias: whether the linear has a bias.
            rows_split: without effect.
        """
        return nn.Linear(inputs, outputs, bias=bias)

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """Build an `nn.Embedding`."""
        return nn.Embedding(vocabulary, width)

    def head(self, width: int, vocabulary: int) -> nn.Module:
        """Build a linear with the kernels' fused cross-entropy, or torch's where they have none."""
        return _Head(width, vocabulary, self.kernels.token_loss)

    def split_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return all rows."""
        return x

    join_rows = split_rows

    def partial_over_rows(self, module: M) -> M:
        """Return the module unmarked: nothing is split."""
        return module

    partial_over_heads = partial_over_rows


class _Head(nn.Module):
    def __init__(self, width: int, vocabulary: int, token_loss: TokenLoss | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.token_loss = token_loss

    def forward(self, hidden_QD: torch.Tensor, label_Q: torch.Tensor) -> torch.Tensor:
        if self.token_loss is not None:
            return self.token_loss(hidden_QD, self.weight, label_Q, shard=WHOLE)
        return functional.cross_entropy(self.logits(hidden_QD), label_Q, reduction="none")

    def logits(self, hidden_QD: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [Q, V] of [Q, D]."""
        return functional.linear(hidden_QD, self.weight).float()

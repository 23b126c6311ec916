"""What a model is built from, so that the model itself never asks for a rank.

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
    """Linears and row exchanges of one kind of parallelism, and the kernels of what lies between the linears."""

    @property
    def kernels(self) -> Kernels:
        """The run's implementation of norms, rotation, SwiGLU, noise and losses."""
        ...

    @property
    def shards(self) -> int:
        """Ways that heads, MLP widths and the vocabulary are split."""
        ...

    def column(self, inputs: int, blocks: Mapping[str, int], *, bias: bool, rows_split: bool) -> nn.Module:
        """Linear [T, inputs] -> [T', outputs / shards]: several named blocks side by side, each split alike.

        With `rows_split` the input holds this rank's share of the rows and the output all of them.
        """
        ...

    def row(self, inputs: int, outputs: int, *, bias: bool, rows_split: bool) -> nn.Module:
        """Linear [T, inputs / shards] -> [T', outputs], summed over shards; `rows_split`: the output is its rows."""
        ...

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """Word embedding ids [T] -> [T, width], equal on all shards."""
        ...

    def head(self, width: int, vocabulary: int) -> nn.Module:
        """Module (hidden [T, width], labels [T]) -> cross-entropy per row [T] in fp32, over a split vocabulary.

        Its method `logits` gives fp32 logits [T, vocabulary] of hidden [T, width], whole on every shard.
        """
        ...

    def split_rows(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's share of rows that are equal on all shards (differentiable)."""
        ...

    def join_rows(self, x: torch.Tensor) -> torch.Tensor:
        """All rows from every rank's share, to feed `head` (differentiable)."""
        ...

    def partial_over_rows(self, module: M) -> M:
        """Mark weights that act on split rows: under row splitting their gradients are sums over shards."""
        ...

    def partial_over_heads(self, module: M) -> M:
        """Mark weights that act on split heads: their gradients are always sums over shards."""
        ...


class SingleDevice:
    """The factory without parallelism: plain torch modules, for reading, tests and small tools."""

    shards = 1

    def __init__(self, kernels: Kernels = TORCH) -> None:
        self.kernels = kernels

    def column(self, inputs: int, blocks: Mapping[str, int], *, bias: bool, rows_split: bool) -> nn.Module:
        """A linear."""
        linear = nn.Linear(inputs, sum(blocks.values()), bias=bias)
        for parameter in linear.parameters():
            shard(parameter, 0, blocks)
        return linear

    def row(self, inputs: int, outputs: int, *, bias: bool, rows_split: bool) -> nn.Module:
        """A linear."""
        return nn.Linear(inputs, outputs, bias=bias)

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """A table."""
        return nn.Embedding(vocabulary, width)

    def head(self, width: int, vocabulary: int) -> nn.Module:
        """A linear and torch's cross-entropy."""
        return _Head(width, vocabulary, self.kernels.token_loss)

    def split_rows(self, x: torch.Tensor) -> torch.Tensor:
        """All rows."""
        return x

    join_rows = split_rows

    def partial_over_rows(self, module: M) -> M:
        """Nothing is split."""
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
        """[Q, D] -> [Q, V] fp32."""
        return functional.linear(hidden_QD, self.weight).float()

"""The model on torch's meta device: names and shapes without storage, whole or as one tensor-parallel rank holds it.

Used by the planner (parameter counts), the checkpoint converters (names and shapes) and resharding (slices of every
rank). The modules are the model's own, built by another layer factory, so that no list of shapes can go stale.
"""

from collections.abc import Mapping

import torch
from torch import nn

from megabagel.config.schema import ModelConfig
from megabagel.model.bagel import Bagel
from megabagel.model.factory import SingleDevice
from megabagel.model.sharding import named_pieces, shard


def build_shapes(
    config: ModelConfig,
    layers: range | None = None,
    first: bool = True,
    last: bool = True,
    tp_rank: int = 0,
    tp: int = 1,
) -> Bagel:
    """Build a model, or a pipeline stage of it, without storage.

    Args:
        config: the model.
        layers: indices of the layers to build; None: all.
        first: whether to build the input embedding.
        last: whether to build the heads.
        tp_rank: tensor-parallel rank whose slices the parameters describe; shapes are equal on all ranks.
        tp: tensor-parallel size; divides heads, MLP widths and vocabulary.
    """
    with torch.device("meta"):
        return Bagel(config, _Shards(tp_rank, tp), layers, first, last)


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every whole-model tensor by name."""
    return {piece.name: piece.shape for piece, _ in named_pieces(build_shapes(config))}


class _Shards(SingleDevice):
    """Layer factory with the shapes of one tensor-parallel rank. The modules cannot run: they do not communicate."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.shards = rank, size

    def column(self, inputs: int, blocks: Mapping[str, int], *, bias: bool, rows_split: bool) -> nn.Module:
        """Build a linear with this rank's share of the outputs.

        Args:
            inputs: input width.
            blocks: full output width of each named block.
            bias: whether the linear has a bias.
            rows_split: without effect on shapes.
        """
        linear = nn.Linear(inputs, sum(blocks.values()) // self.shards, bias=bias)
        for parameter in linear.parameters():
            shard(parameter, 0, blocks, self.rank, self.shards)
        return linear

    def row(self, inputs: int, outputs: int, *, bias: bool, rows_split: bool) -> nn.Module:
        """Build a linear with this rank's share of the inputs.

        Args:
            inputs: full input width.
            outputs: output width.
            bias: whether the linear has a bias.
            rows_split: without effect on shapes.
        """
        linear = nn.Linear(inputs // self.shards, outputs, bias=bias)
        self._shard(linear, 1, inputs)
        return linear

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """Build an embedding with this rank's share of the vocabulary."""
        table = nn.Embedding(vocabulary // self.shards, width)
        self._shard(table, 0, vocabulary)
        return table

    def head(self, width: int, vocabulary: int) -> nn.Module:
        """Build a head with this rank's share of the vocabulary."""
        head = super().head(width, vocabulary // self.shards)
        self._shard(head, 0, vocabulary)
        return head

    def _shard(self, module: nn.Module, dim: int, size: int) -> None:
        shard(module.get_parameter("weight"), dim, {"": size}, self.rank, self.shards)

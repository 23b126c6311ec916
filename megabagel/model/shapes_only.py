"""The model's shapes without its numbers: modules on torch's meta device, whole or one tensor-parallel rank's.

For who asks what a model consists of: the planner counts its numbers, the converters its names and shapes, resharding
where each rank's slices lie. Nothing is restated: the modules are the model's own, built by another layer factory.
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
    """A model, or a stage of it, without storage.

    Args:
        config: the model.
        layers: numbers of the layers in it; None: all.
        first: with the inputs.
        last: with the heads.
        tp_rank: which of `tp` tensor-parallel ranks' shares; all have the same shapes.
        tp: tensor-parallel size, which divides heads, MLP widths and vocabulary.
    """
    with torch.device("meta"):
        return Bagel(config, _Shards(tp_rank, tp), layers, first, last)


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every whole-model tensor, by its name."""
    return {piece.name: piece.shape for piece, _ in named_pieces(build_shapes(config))}


class _Shards(SingleDevice):
    """Plain layers in the sizes of one tensor-parallel rank, described as its shards; to be looked at, not run."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.shards = rank, size

    def column(self, inputs: int, blocks: Mapping[str, int], *, bias: bool, rows_split: bool) -> nn.Module:
        """Segment by outputs."""
        linear = nn.Linear(inputs, sum(blocks.values()) // self.shards, bias=bias)
        for parameter in linear.parameters():
            shard(parameter, 0, blocks, self.rank, self.shards)
        return linear

    def row(self, inputs: int, outputs: int, *, bias: bool, rows_split: bool) -> nn.Module:
        """Segment by inputs."""
        linear = nn.Linear(inputs // self.shards, outputs, bias=bias)
        self._shard(linear, 1, inputs)
        return linear

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """Segment by tokens of the vocabulary."""
        table = nn.Embedding(vocabulary // self.shards, width)
        self._shard(table, 0, vocabulary)
        return table

    def head(self, width: int, vocabulary: int) -> nn.Module:
        """Segment by tokens of the vocabulary."""
        head = super().head(width, vocabulary // self.shards)
        self._shard(head, 0, vocabulary)
        return head

    def _shard(self, module: nn.Module, dim: int, size: int) -> None:
        shard(module.get_parameter("weight"), dim, {"": size}, self.rank, self.shards)

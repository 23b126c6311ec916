"""Mapping between a rank's parameters and the tensors of the whole model.

Initialization, checkpoints, import, export and resharding all use this one description. A tensor-parallel linear may
hold several named blocks side by side (q, k, v; gate, up), each split over ranks by itself. In the whole model each
block is a tensor of its own, so that names and shapes there do not depend on the grid.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Sharded:
    """Description of a tensor-parallel parameter, attached to it as `.sharded`."""

    dim: int
    """Dimension that is split."""
    blocks: Mapping[str, int]
    """Full size along `dim` of each block by name, in local order. A single block named "" keeps the module's name."""
    rank: int
    """This rank's tensor-parallel index."""
    size: int
    """Tensor-parallel size."""


@dataclass(frozen=True)
class Piece:
    """The slice of one whole-model tensor that a parameter of this rank holds."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Offset of this rank's slice in the whole tensor."""
    dim: int
    start: int
    length: int
    """In the parameter, the slice is [start, start + length) of dimension `dim`."""
    replicated: bool
    """Whether every tensor-parallel rank holds the same values."""

    def view(self, local: torch.Tensor) -> torch.Tensor:
        """Return this piece as a view of `local`, a tensor with the shape of the parameter."""
        return local.narrow(self.dim, self.start, self.length)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of the whole tensor as a view."""
        return whole.narrow(self.dim, self.offset[self.dim], self.length)


def pieces(name: str, parameter: nn.Parameter) -> list[Piece]:
    """Return the pieces of whole-model tensors that the parameter named `name` holds."""
    sharded: Sharded | None = getattr(parameter, "sharded", None)
    shape = tuple(parameter.shape)
    if sharded is None:
        return [Piece(name, shape, (0,) * len(shape), 0, 0, shape[0], replicated=True)]
    result, start = [], 0
    for block, size in sharded.blocks.items():
        length = size // sharded.size
        whole = tuple(size if dim == sharded.dim else extent for dim, extent in enumerate(shape))
        offset = tuple(sharded.rank * length if dim == sharded.dim else 0 for dim in range(len(shape)))
        result.append(Piece(_block_name(name, block), whole, offset, sharded.dim, start, length, sharded.size == 1))
        start += length
    assert start == shape[sharded.dim], (name, sharded, shape)
    return result


def _block_name(name: str, block: str) -> str:
    """Return a block's tensor name: `layers.0.attention.und.qkv.weight`, `q` -> `layers.0.attention.und.q.weight`."""
    if not block:
        return name
    module, _, leaf = name.rpartition(".")
    return ".".join([*module.split(".")[:-1], block, leaf])


def shard(parameter: nn.Parameter, dim: int, blocks: Mapping[str, int], rank: int = 0, size: int = 1) -> None:
    """Attach to `parameter` the description of its slices.

    Args:
        parameter: this rank's parameter.
        dim: dimension that is split over tensor-parallel ranks.
        blocks: full size along `dim` of each named block (see `Sharded`).
        rank: tensor-parallel index.
        size: tensor-parallel size.
    """
    parameter.sharded = Sharded(dim, dict(blocks), rank, size)  # type: ignore[attr-defined]


def named_pieces(module: nn.Module) -> Iterator[tuple[Piece, nn.Parameter]]:
    """Yield every piece of every parameter of a module, with the parameter."""
    for name, parameter in module.named_parameters():
        for piece in pieces(name, parameter):
            yield piece, parameter

"""How a rank's parameters lie in the whole model: the one description that initialisation and checkpoints share.

A tensor-parallel linear may hold several named blocks side by side (q, k, v; gate, up), each split alike. In the whole
model each block is a tensor of its own, so names and shapes there do not depend on the grid.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Sharded:
    """Attached to a parameter as `.sharded`: which dimension is split over tensor-parallel ranks, into which blocks.

    blocks: full sizes along the dimension by name, in local order; a single block named "" keeps the module's name.
    """

    dim: int
    blocks: Mapping[str, int]
    rank: int
    size: int


@dataclass(frozen=True)
class Piece:
    """One tensor of the whole model, as far as this rank holds it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Of the local part in it."""
    dim: int
    start: int
    length: int
    """The local part lies at [start, start + length) of the parameter's dimension `dim`."""
    replicated: bool
    """Every tensor-parallel rank holds the same values."""

    def view(self, local: torch.Tensor) -> torch.Tensor:
        """The part of a tensor shaped like the parameter that belongs to this piece."""
        return local.narrow(self.dim, self.start, self.length)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The local part of the whole tensor."""
        return whole.narrow(self.dim, self.offset[self.dim], self.length)


def pieces(name: str, parameter: nn.Parameter) -> list[Piece]:
    """Tensors of the whole model that a parameter named `name` holds parts of."""
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
    """`layers.0.attention.und.qkv.weight` and block `q` -> `layers.0.attention.und.q.weight`."""
    if not block:
        return name
    module, _, leaf = name.rpartition(".")
    return ".".join([*module.split(".")[:-1], block, leaf])


def shard(parameter: nn.Parameter, dim: int, blocks: Mapping[str, int], rank: int = 0, size: int = 1) -> None:
    """Write down how `parameter` lies in the whole model."""
    parameter.sharded = Sharded(dim, dict(blocks), rank, size)  # type: ignore[attr-defined]


def named_pieces(module: nn.Module) -> Iterator[tuple[Piece, nn.Parameter]]:
    """Every piece of every parameter of a stage."""
    for name, parameter in module.named_parameters():
        for piece in pieces(name, parameter):
            yield piece, parameter

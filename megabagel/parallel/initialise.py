"""Initial weights by name: the same numbers on every grid, drawn on the CPU whatever the device."""

import math

import torch
from torch import nn

from megabagel.config.schema import ModelConfig
from megabagel.model.noise import normal
from megabagel.parallel.sharding import Piece, named_pieces
from megabagel.sequence.keys import seed64

OUTPUTS = ("o.weight", "down.weight", "fc2.weight")
"""Linears that write into a residual stream; their scale shrinks with depth."""


@torch.no_grad()
def initialise(stage: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a stage. Each whole tensor is drawn from a generator keyed by (seed, name), then cut."""
    for piece, parameter in named_pieces(stage):
        piece.view(parameter).copy_(piece.cut(_whole(piece, config, seed)))


def _whole(piece: Piece, config: ModelConfig, seed: int) -> torch.Tensor:
    leaf = ".".join(piece.name.split(".")[-2:])
    if leaf.endswith("bias") or leaf.startswith("llm2vae"):  # the velocity head starts at zero (bagel-reference 2)
        return torch.zeros(piece.shape)
    if "norm" in piece.name:
        return torch.ones(piece.shape)
    std = config.init_std
    if leaf in OUTPUTS and ".layers." in f".{piece.name}":
        std /= math.sqrt(2 * config.layers)
    return normal(seed64(seed, "init", piece.name), *piece.shape) * std

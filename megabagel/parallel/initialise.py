"""Initial weights by name: the same numbers on every grid, drawn on the CPU whatever the device."""

import math

import torch
from torch import nn

from megabagel.config.schema import ModelConfig
from megabagel.model.noise import normal
from megabagel.model.sharding import named_pieces
from megabagel.sequence.keys import seed64

OUTPUTS = ("o.weight", "down.weight", "fc2.weight")
"""Linears that write into a residual stream; their scale shrinks with depth."""


@torch.no_grad()
def initialise(stage: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a stage. Each whole tensor is drawn from a generator keyed by (seed, name), then cut."""
    for piece, parameter in named_pieces(stage):
        piece.view(parameter).copy_(piece.cut(initial_values(piece.name, piece.shape, config, seed)))


def initial_values(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """What the whole tensor `name` starts as: float32, on the CPU."""
    leaf = ".".join(name.split(".")[-2:])
    if leaf.endswith("bias") or leaf.startswith("llm2vae"):  # the velocity head starts at zero (bagel-reference 2)
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    std = config.init_std
    if leaf in OUTPUTS and ".layers." in f".{name}":
        std /= math.sqrt(2 * config.layers)
    return normal(seed64(seed, "init", name), *shape) * std

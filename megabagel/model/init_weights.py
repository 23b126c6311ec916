"""Initial weights by name: the same numbers on every grid, drawn on the CPU whatever the device."""

import math

import torch
from torch import nn

from megabagel.config.schema import ModelConfig
from megabagel.model.noise import normal
from megabagel.model.sharding import named_pieces
from megabagel.runtime.phase import alive
from megabagel.sequence.keys import seed64

OUTPUTS = ("o.weight", "down.weight", "fc2.weight")
"""Linears that write into a residual stream; their scale shrinks with depth."""


@torch.no_grad()
def init_weights(stage: nn.Module, config: ModelConfig, seed: int, draw: bool = True) -> None:
    """Fill every parameter of a stage. Each whole tensor is drawn from a generator keyed by (seed, name), then cut.

    Without `draw` those that start as random numbers (20 ns each) are left as they are, for a checkpoint to fill.
    """
    for piece, parameter in named_pieces(stage):
        alive()
        if draw or _constant(piece.name) is not None:
            piece.view(parameter).copy_(piece.cut(initial_values(piece.name, piece.shape, config, seed)))


def initial_values(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """What the whole tensor `name` starts as: float32, on the CPU."""
    constant = _constant(name)
    if constant is not None:
        return torch.full(shape, constant)
    std = config.init_std
    if ".".join(name.split(".")[-2:]) in OUTPUTS and ".layers." in f".{name}":
        std /= math.sqrt(2 * config.layers)
    return normal(seed64(seed, "init", name), *shape) * std


def _constant(name: str) -> float | None:
    """What every number of a tensor starts as, unless they are drawn."""
    *_, module, leaf = f".{name}".split(".")
    if leaf.endswith("bias") or module.startswith("llm2vae"):  # the velocity head starts at zero (bagel-reference 2)
        return 0.0
    return 1.0 if "norm" in name else None

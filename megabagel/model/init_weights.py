"""Initial weights keyed by (seed, parameter name): the same values on every grid and device."""

import math
from collections.abc import Callable

import torch
from torch import nn

from megabagel.config.schema import ModelConfig
from megabagel.model.noise import normal
from megabagel.model.sharding import named_pieces
from megabagel.sequence.keys import seed64

OUTPUTS = ("o.weight", "down.weight", "fc2.weight")
"""Linears that write into a residual stream; their standard deviation is divided by sqrt(2 * layers)."""

_INIT_KEYS = {"embed.tokens.weight": "embed.words.weight"}
"""Earlier names of renamed tensors, under which their values are still drawn: a rename must not change initial weights,
or the recorded golden loss curve would no longer match."""


@torch.no_grad()
def initialize_weights(
    stage: nn.Module,
    config: ModelConfig,
    seed: int,
    draw: bool = True,
    on_parameter: Callable[[], None] = lambda: None,
) -> None:
    """Fill every parameter of a model or pipeline stage in place with its initial values.

    Each whole-model tensor is drawn on the CPU from a generator keyed by (seed, name) and then cut to this rank's
    slice, so that a model has the same weights on one device and on any grid.

    Args:
        stage: the modules of one pipeline stage, or a whole model.
        config: the model's sizes and `init_std`.
        seed: `train.seed`.
        draw: False leaves tensors that start as random numbers unfilled, because a checkpoint will fill them (drawing
            takes 20 ns per number: 335 s per rank for a 7B model).
        on_parameter: called before each parameter; a job passes `keepalive`, so that the long initialization does not
            count as a hang.
    """
    for piece, parameter in named_pieces(stage):
        on_parameter()
        if draw or _constant(piece.name) is not None:
            piece.view(parameter).copy_(piece.cut(initial_values(piece.name, piece.shape, config, seed)))


def initial_values(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """Return the initial values of a whole-model tensor: float32, on the CPU.

    Args:
        name: name of the tensor in the whole model.
        shape: its whole shape.
        config: `init_std` and number of layers.
        seed: `train.seed`.
    """
    constant = _constant(name)
    if constant is not None:
        return torch.full(shape, constant)
    std = config.init_std
    if ".".join(name.split(".")[-2:]) in OUTPUTS and ".layers." in f".{name}":
        std /= math.sqrt(2 * config.layers)
    return normal(seed64(seed, "init", _INIT_KEYS.get(name, name)), *shape) * std


def _constant(name: str) -> float | None:
    """Return the constant that a tensor is filled with, or None if its values are drawn."""
    *_, module, leaf = f".{name}".split(".")
    # llm2vae starts at zero so that the first predicted velocity is zero (docs/bagel.md#initial-weights).
    if leaf.endswith("bias") or module.startswith("llm2vae"):
        return 0.0
    return 1.0 if "norm" in name else None

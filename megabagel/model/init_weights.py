"""Initial weights by name: the same numbers on every grid, drawn on the CPU whatever the device."""

import math
from collections.abc import Callable

import torch
from torch import nn

from megabagel.config.schema import ModelConfig
from megabagel.model.noise import normal
from megabagel.model.sharding import named_pieces
from megabagel.sequence.keys import seed64

OUTPUTS = ("o.weight", "down.weight", "fc2.weight")
"""Linears that write into a residual stream; their scale shrinks with depth."""

_INIT_KEYS = {"embed.tokens.weight": "embed.words.weight"}
"""Names that key the draw of a tensor, where they differ from its name: the key keeps the name that the tensor had when
the golden loss curve was recorded, so that a rename moves no initial weight."""


@torch.no_grad()
def initialize_weights(
    stage: nn.Module,
    config: ModelConfig,
    seed: int,
    draw: bool = True,
    on_parameter: Callable[[], None] = lambda: None,
) -> None:
    """Fill every parameter of a stage in place with its initial values.

    Each whole tensor is drawn from a generator keyed by (seed, name) and then cut to this rank's piece, so a model has
    the same weights on one device and on any grid.

    Args:
        stage: the modules of one pipeline stage, or a whole model.
        config: the model's sizes and `init_std`.
        seed: `train.seed`.
        draw: False leaves tensors that start as random numbers as they are, for a checkpoint to fill (drawing takes
            20 ns per number: 335 s per rank for a 7B model).
        on_parameter: called before each parameter; a job's heartbeat passes its keepalive here.
    """
    for piece, parameter in named_pieces(stage):
        on_parameter()
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
    return normal(seed64(seed, "init", _INIT_KEYS.get(name, name)), *shape) * std


def _constant(name: str) -> float | None:
    """What every number of a tensor starts as, unless they are drawn."""
    *_, module, leaf = f".{name}".split(".")
    if leaf.endswith("bias") or module.startswith("llm2vae"):  # llm2vae: docs/bagel.md#initial-weights
        return 0.0
    return 1.0 if "norm" in name else None

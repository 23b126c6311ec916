"""Memory check before a model is built.

On a CPU an oversized model would not raise an error: it would fill the machine's memory and take other processes down.
"""

import os

import torch

from megabagel.config.schema import Config, ModelConfig
from megabagel.errors import UserError


def check_memory(config: Config, device: torch.device, dp: int) -> None:
    """Raise UserError if weights, gradients and optimizer state alone need more memory than the device has.

    A lower bound on purpose: activations, buffers and other ranks of the same machine are left out (`megabagel plan`
    estimates them), so no config that could run is refused.

    Args:
        config: the run.
        device: device of the weights.
        dp: number of ranks that the optimizer's state is sharded over.
    """
    model = config.model
    tables = 4 * model.hidden * (model.latent_grid**2 * model.visual_gen + model.vit.grid**2 * model.visual_und)
    needed = parameters(model) // (config.parallel.tp * config.parallel.pp) * _bytes_each(config, dp) + tables
    there = _memory(device)
    if needed > there:
        raise UserError(
            f"model: about {parameters(model):,} parameters take at least {needed / 2**30:,.0f} GiB per rank in "
            f"training, and {device} has {there / 2**30:,.0f} GiB. Check model.hidden, ffn, layers, vocab and "
            "latent_grid, or spread it with parallel.tp and parallel.pp (megabagel plan)."
        )


def parameters(model: ModelConfig) -> int:
    """Numbers of the large matrices of the model; norms, biases, connectors and frozen position tables are left out."""
    width, heads = model.hidden, model.kv_channels
    attention = 2 * width * heads * (model.heads + model.kv_heads)
    mlp = 3 * width * model.ffn
    layer = {"dense": attention + mlp, "moe": attention + 2 * mlp, "mot": 2 * (attention + mlp)}[model.variant]
    total = 2 * model.vocab * width + model.layers * layer
    if model.visual_und:
        vit = model.vit
        total += vit.layers * (4 * vit.hidden**2 + 2 * vit.hidden * vit.ffn) + vit.grid**2 * vit.hidden
    return total


def _bytes_each(config: Config, dp: int) -> float:
    """Bytes per parameter: weight, fp32 gradient, and this rank's share of moments, fp32 weight and average."""
    if config.train.freeze:
        # At least a bf16 weight: the freeze list decides which parameters have gradients, and is not evaluated here.
        return 2
    state = 8 + (4 if config.train.precision == "bf16" else 0) + (4 if config.train.ema else 0)
    return (2 if config.train.precision == "bf16" else 4) + 4 + state / dp


def _memory(device: torch.device) -> int:
    """Memory of the device in bytes; for a CPU that of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

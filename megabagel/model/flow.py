"""Timesteps of rectified flow and their embedding (docs/bagel.md#flow-time, #layer)."""

import math

import torch
from torch import Tensor, nn

FEATURES = 256
"""Sinusoidal features of a timestep."""


def timestep(draw: Tensor, shift: float, precision: str = "fp32") -> Tensor:
    """Timestep t in [0, 1], float32, of a standard normal `draw`: 0 is data, 1 is noise.

    s = sigmoid(draw) (logit-normal), t = k s / (1 + (k - 1) s) with k = `shift`. A draw of -inf, that of a clean image,
    gives exactly 0. With `precision` bf16 every operation rounds to bf16, as under the released trainer's casts.
    """
    s = draw.to(torch.bfloat16 if precision == "bf16" else torch.float32).sigmoid()
    return (shift * s / (1 + (shift - 1) * s)).float()


def timestep_features(t_I: Tensor) -> Tensor:
    """concat(cos(t w), sin(t w)) [I, 256] float32 with w_i = 10000 ** (-i / 128); t is not scaled."""
    half = FEATURES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_I.device) / half
    angles = torch.outer(t_I.float(), torch.exp(-math.log(10000.0) * exponents))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedder(nn.Module):
    """Timesteps [I] to hidden states [I, D], added to the latent tokens: features, Linear, SiLU, Linear."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t_I: Tensor) -> Tensor:
        """Features are made in float32 whatever the type of the weights: bf16 has too few digits for a timestep."""
        return self.mlp(timestep_features(t_I).to(next(self.parameters()).dtype))

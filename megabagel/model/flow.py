"""Rectified-flow timesteps and their embedding (docs/bagel.md#flow-time, #layer)."""

import math

import torch
from torch import Tensor, nn

FEATURES = 256
"""Number of sinusoidal features of a timestep."""


def timestep(draw: Tensor, shift: float, precision: str = "fp32") -> Tensor:
    """Map standard normal draws to timesteps in [0, 1]: 0 is data, 1 is noise.

    s = sigmoid(draw) (logit-normal), t = k s / (1 + (k - 1) s) with k = `shift`.

    Args:
        draw: normal draws u; -inf, that of a clean image, gives exactly 0.
        shift: `train.timestep_shift`; above 1 it moves timesteps towards noise.
        precision: "bf16" rounds every operation to bf16, as the released trainer's casts do
            (docs/bagel.md#precision).

    Returns:
        float32, the shape of `draw`.
    """
    s = draw.to(torch.bfloat16 if precision == "bf16" else torch.float32).sigmoid()
    return (shift * s / (1 + (shift - 1) * s)).float()


def timestep_features(t_I: Tensor) -> Tensor:
    """Return float32 [I, 256]: concat(cos(t w), sin(t w)) with w_i = 10000 ** (-i / 128)."""
    # t enters in [0, 1] as it is, without the usual factor of 1000 (docs/bagel.md#layer).
    half = FEATURES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_I.device) / half
    angles = torch.outer(t_I.float(), torch.exp(-math.log(10000.0) * exponents))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedder(nn.Module):
    """Timestep embedding [I] -> [I, D], added to latent tokens: sinusoidal features, Linear, SiLU, Linear."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t_I: Tensor) -> Tensor:
        """Return the embedding [I, D] in the type of the weights."""
        # Features are computed in float32 and cast afterwards: bf16 keeps 8 significant bits, too few for a timestep.
        return self.mlp(timestep_features(t_I).to(next(self.parameters()).dtype))

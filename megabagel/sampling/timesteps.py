"""The timestep grid of flow sampling and the Euler step along it: t runs from 1 (noise) to 0 (data)."""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

N = TypeVar("N", float, np.ndarray, Tensor)


def shifted(u: N, shift: float) -> N:
    """Timesteps k u / (1 + (k - 1) u) of evenly spaced `u`; k = `shift` > 1 spends more steps near the noise."""
    return shift * u / (1 + (shift - 1) * u)


def timestep_grid(points: int, shift: float) -> np.ndarray:
    """`points` shifted timesteps from 1 to 0 as float32: `points - 1` Euler steps. One point makes no step.

    Computed in float32 as the released sampler does: guidance intervals are compared with these values, and 0.6 of a
    float64 grid may be 0.59999996 here.
    """
    return shifted(torch.linspace(1, 0, points), shift).numpy()


def euler_step(x: Tensor, velocity: Tensor, now: float, then: float) -> Tensor:
    """Euler step: x at timestep `then` from x at `now`, where dx/dt = `velocity`.

    Args:
        x: state at `now`, any shape.
        velocity: of the shape of `x`.
        now: current timestep in [0, 1].
        then: next timestep, smaller than `now`.
    """
    return x - velocity * (now - then)

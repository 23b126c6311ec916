"""Gaussian noise that belongs to a seed, not to a rank, a batch or the draws before it."""

import numpy as np
import torch
from torch import Tensor


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float32 numbers on the CPU, a function of `seed` and `shape` alone.

    `seed` is any integer of 64 bits, signed or not. Philox heeds all of them, torch's CPU generator only the lower 32.
    """
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

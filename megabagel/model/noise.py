"""Gaussian noise keyed by a seed, independent of rank, batch and earlier draws."""

import numpy as np
import torch
from torch import Tensor


def normal(seed: int, *shape: int) -> Tensor:
    """Return standard normal float32 numbers on the CPU, a function of `seed` and `shape` alone.

    `seed` is any 64-bit integer, signed or not.
    """
    # Philox uses all 64 bits of the seed; torch's CPU generator would use only the lower 32.
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

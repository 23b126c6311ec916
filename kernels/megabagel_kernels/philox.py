"""Counter-based normal noise: a draw depends only on its seed and its number, never on packing, rank or order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the Box-Muller transform, with
the conventions of Triton's `tl.randn(seed, offset)`, so that a kernel can draw the same numbers where it needs them.
`torch.Generator` would not do: its numbers depend on how many were drawn before, and differ between CPU and GPU.
32-bit words are held in int64 tensors, whose products wrap to the right 64 bits.

Letters: G rows (latent tokens).
"""

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two; shapes broadcast.

    Words are int64 in [0, 2^32). Only the low 32 bits of the key are used, so both halves of a seed may be signed.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product2 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0 = (product2 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = product2, product0  # their low words; the next round masks the bits above
        k0, k1 = k0 + _KEY_STEP[0], k1 + _KEY_STEP[1]
    return c0, c1 & _LOW, c2, c3 & _LOW


def philox_normal(seed: Tensor, offset: Tensor) -> Tensor:
    """Standard normal fp32 draws number `offset` (int64, not negative) of `seed` (int64, any); shapes broadcast."""
    counter = torch.broadcast_to(offset, torch.broadcast_shapes(seed.shape, offset.shape))
    zero = torch.zeros_like(counter)
    first, second, _, _ = philox((counter & _LOW, counter >> 32, zero, zero), (seed, seed >> 32))
    # Uniforms and angle are rounded to fp32 as in Triton. log, sqrt and cos are evaluated in fp64, because in fp32 they
    # may differ in the last bit between machines.
    log = _uniform(first).clamp_min_(1e-7).double().log_()
    angle = _uniform(second).mul_(2 * math.pi).double()
    return log.mul_(-2).sqrt_().mul_(angle.cos_()).float()


def _uniform(word: Tensor) -> Tensor:
    """A 32-bit word as fp32 in [0, 1) by Triton's rule: taken as signed, negatives complemented, times almost 2^-31."""
    return torch.minimum(word, _LOW - word).float().mul_(4.6566127342e-10)


def noise_rows(seed_G: Tensor, row_G: Tensor, width: int, device: torch.device | str | None = None) -> Tensor:
    """Standard normal noise for rows that have a seed and a row number each.

    Args:
        seed_G: [G] int64, any value.
        row_G: [G] int64, not negative: number of the row among those of its seed.
        width: numbers per row.
        device: where to make them; default the device of the seeds.

    Returns:
        fp32 [G, width]; element (g, c) is draw number row_G[g] * width + c of seed_G[g].
    """
    seed_G, row_G = seed_G.to(device or seed_G.device), row_G.to(device or seed_G.device)
    return philox_normal(seed_G[:, None], row_G[:, None] * width + torch.arange(width, device=row_G.device))

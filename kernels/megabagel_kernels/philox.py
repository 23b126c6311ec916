"""Counter-based normal noise: element (row, column) is a function of the row's seed and number alone.

Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller with the conventions of Triton's `tl.randn(seed, offset)`, so that
a kernel can make the same numbers where it needs them. All arithmetic is on unsigned 32-bit words held in int64.
"""

import math

import torch

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _multiply(word: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(high, low) 32 bits of a 32 x 32-bit product; the 64-bit product itself would not fit a signed integer."""
    upper, lower = factor >> 16, factor & 0xFFFF
    cross = word * lower
    high = word * upper + (cross >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (cross & 0xFFFF)


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Ten rounds of Philox4x32 on int64 tensors of 32-bit words; shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high_a, low_a = _multiply(c0, _ROUND_A)
        high_b, low_b = _multiply(c2, _ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _uniform(word: torch.Tensor) -> torch.Tensor:
    """32 bits -> fp32 in [0, 1), as Triton folds them: sign dropped by complement, scale just below 2^-31."""
    signed = torch.where(word >= 2**31, word - 2**32, word)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.float() * 4.6566127342e-10


def noise_rows(seed_R: torch.Tensor, row_R: torch.Tensor, width: int) -> torch.Tensor:
    """Standard normal fp32 [R, width]; element (r, c) is draw number row_R[r] * width + c of seed_R[r] (int64)."""
    offset = row_R[:, None] * width + torch.arange(width, device=row_R.device)
    zero = torch.zeros_like(offset)
    key = ((seed_R & _MASK)[:, None], ((seed_R >> 32) & _MASK)[:, None])
    first, second, _, _ = philox((offset & _MASK, zero, zero, zero), key)
    radius = (-2.0 * _uniform(first).clamp_min(1e-7).log()).sqrt()
    return radius * (2 * math.pi * _uniform(second)).cos()

"""Philox against its authors' vectors and Triton's draws; keyed normal noise."""

import math

import pytest
import torch
from megabagel_kernels.philox import noise_rows, philox, philox_normal

# kat_vectors of Random123 1.14, philox 4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# `tl.randn(seed, offset)` of Triton 3.7.1 in its interpreter: a row per seed, a column per offset.
TRITON_SEEDS = [0, 1, -1, 0x123456789ABCDEF, -(2**63)]
TRITON_OFFSETS = [0, 1, 63, 64, 2**31 + 5, 2**32 - 1, 2**32, 2**40 + 7]
TRITON_DRAWS = [
    [0.0465515, -0.3883614, -2.2622607, 1.1455035, 0.4876275, -1.2274312, 0.2871584, 0.5717906],
    [0.4264179, -0.0102470, -0.2362159, 0.5457743, 1.2126031, -3.2761927, -0.0262329, -1.8546442],
    [0.2358419, -1.5129384, -0.9355728, 0.0224241, 0.6827684, 1.1855437, 0.2224864, 0.4477470],
    [-1.0370673, -0.5882710, 1.0885894, -0.1626011, -1.4189910, 0.9766978, -0.4586209, 0.6647833],
    [0.8120156, -0.7345662, 0.4374253, 1.4497544, 0.2149924, 0.2020028, 0.3996156, 0.1898943],
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str):
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    assert philox((c0, c1, c2, c3), (k0, k1)) == words(result)


def test_draws_are_those_of_triton():
    seed = torch.tensor(TRITON_SEEDS)
    found = philox_normal(seed[:, None], torch.tensor(TRITON_OFFSETS))
    assert torch.allclose(found, torch.tensor(TRITON_DRAWS), rtol=0, atol=5e-7)


def test_rows_are_the_same_in_any_company():
    draw = torch.Generator().manual_seed(0)
    seed = torch.randint(-(2**63), 2**63 - 1, (500,), generator=draw)
    row = torch.randint(0, 2**20, (500,), generator=draw)
    whole = noise_rows(seed, row, 63)
    assert whole.dtype == torch.float32 and whole.shape == (500, 63)
    order = torch.randperm(500, generator=draw)
    assert torch.equal(noise_rows(seed[order], row[order], 63), whole[order])
    for start, stop in ((0, 1), (17, 24), (499, 500), (3, 3)):
        assert torch.equal(noise_rows(seed[start:stop], row[start:stop], 63, device="cpu"), whole[start:stop])
    for r, c in ((0, 0), (17, 62), (499, 5)):
        assert philox_normal(seed[r], row[r] * 63 + c) == whole[r, c]


def test_every_bit_of_seed_and_offset_counts():
    seeds = torch.tensor([0, *(1 << bit for bit in range(63)), -(2**63)])
    assert len(philox_normal(seeds[:, None], torch.arange(8)).unique(dim=0)) == len(seeds)
    offsets = torch.tensor([0, *(1 << bit for bit in range(62))])
    assert len(philox_normal(torch.tensor(-5), offsets).unique()) > 0.99 * len(offsets)


def test_moments_of_a_normal():
    """Within 5 standard errors: mean, variance, skew, kurtosis, and correlation of neighbours in row and column."""
    noise = noise_rows(torch.arange(-1000, 1000), torch.zeros(2000, dtype=torch.int64), 256).double()
    count = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(noise.pow(power).mean() - moment) < 5 * math.sqrt(variance / count)
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / math.sqrt(count)
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 5 / math.sqrt(count)
    assert 4.3 < noise.abs().max() < math.sqrt(-2 * math.log(1e-7))

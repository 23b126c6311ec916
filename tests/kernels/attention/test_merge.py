"""Attention over parts of the keys, merged, is attention over all of them."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention.host import host_attention_lse, plan_host
from megabagel_kernels.attention.merge import merge
from megabagel_kernels.attention.reference import attention_reference

from tests.kernels.attention.packs import Pack, Segment, examples, packs, ranges_of


@examples(60)
@given(packs(), st.integers(0, 2), st.integers(1, 4), st.integers(0, 2**32))
def test_parts_of_the_keys_merge_to_the_whole(pack: Pack, padding: int, parts: int, seed: int):
    ranges = ranges_of(pack).padded(padding)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(ranges.keys, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    dealt = np.random.default_rng(seed).integers(0, parts, ranges.keys)
    keys = [np.flatnonzero(dealt == part) for part in range(parts)]
    found = [host_attention_lse(q, k[own], v[own], plan_host(ranges.take(None, own))) for own in keys]
    out, lse = merge([part[0] for part in found], [part[1] for part in found])
    expected, expected_lse = attention_reference(q, k, v, ranges)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    assert torch.allclose(lse, expected_lse, rtol=0, atol=1e-13)


def test_gradients_pass_through_a_merge_also_where_a_part_sees_nothing():
    ranges = ranges_of([[Segment(3, "causal"), Segment(2, "noise")]]).padded(1)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, n, 4, dtype=torch.float64, generator=draw).requires_grad_() for n in (2, 1, 1))
    early, late = ranges.take(None, range(2)), ranges.take(None, range(2, 6))

    def merged() -> tuple[torch.Tensor, torch.Tensor]:
        first = attention_reference(q, k[:2], v[:2], early)
        second = attention_reference(q, k[2:], v[2:], late)
        return merge([first[0], second[0]], [first[1], second[1]])

    def both(result: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(result[0].square().sum() + result[1].nan_to_num(neginf=0).sum(), (q, k, v))

    for found, expected in zip(both(merged()), both(attention_reference(q, k, v, ranges)), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-13)

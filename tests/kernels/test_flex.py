"""The FlexAttention engine against the dense reference, forward only: torch has no backward on a CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention.flex_engine import flex_attention_packed, plan_flex
from megabagel_kernels.attention.reference import attention_reference

from tests.kernels.packs import Pack, codes_of, examples, packs, selections


@examples(40)
@given(packs(longest=40), st.integers(0, 3), st.sampled_from([(4, 2), (3, 3)]), st.data())
def test_equals_the_dense_reference(pack: Pack, padding: int, heads: tuple[int, int], data: st.DataObject):
    whole = codes_of(pack).padded(padding)
    codes = whole.take(data.draw(selections(whole.queries)), data.draw(selections(whole.keys)))
    if not codes.queries or not codes.keys:
        return
    draw = torch.Generator().manual_seed(codes.queries)
    q, k, v = (
        torch.randn(n, h, 16, generator=draw)
        for n, h in ((codes.queries, heads[0]), (codes.keys, heads[1]), (codes.keys, heads[1]))
    )
    found = flex_attention_packed(q, k, v, plan_flex(codes))
    torch.testing.assert_close(found, attention_reference(q, k, v, codes)[0], rtol=1e-5, atol=2e-6)


def test_inputs_that_cannot_be():
    codes = codes_of([[]]).padded(4)
    x = torch.randn(4, 2, 16)
    with pytest.raises(ValueError, match=r"k: the plan is for \[4, heads, head dim\], found \[3, 2, 16\]"):
        flex_attention_packed(x, x[:3], x, plan_flex(codes))
    with pytest.raises(ValueError, match="no backward on a CPU"):
        flex_attention_packed(x.requires_grad_(), x, x, plan_flex(codes))
    assert np.isfinite(flex_attention_packed(x.detach(), x.detach(), x.detach(), plan_flex(codes)).numpy()).all()

"""The FlexAttention engine against the dense reference, forward only: torch has no backward on a CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention.flex import flex_attention_packed, plan_flex
from megabagel_kernels.attention.reference import attention_reference

from tests.kernels.attention.packs import Pack, examples, packs, ranges_of, selections


@examples(40)
@given(packs(longest=40), st.integers(0, 3), st.sampled_from([(4, 2), (3, 3)]), st.data())
def test_equals_the_dense_reference(pack: Pack, padding: int, heads: tuple[int, int], data: st.DataObject):
    whole = ranges_of(pack).padded(padding)
    ranges = whole.take(data.draw(selections(whole.queries)), data.draw(selections(whole.keys)))
    if not ranges.queries or not ranges.keys:
        return
    draw = torch.Generator().manual_seed(ranges.queries)
    q, k, v = (
        torch.randn(n, h, 16, generator=draw)
        for n, h in ((ranges.queries, heads[0]), (ranges.keys, heads[1]), (ranges.keys, heads[1]))
    )
    found = flex_attention_packed(q, k, v, plan_flex(ranges))
    torch.testing.assert_close(found, attention_reference(q, k, v, ranges)[0], rtol=1e-5, atol=2e-6)


def test_inputs_that_cannot_be():
    ranges = ranges_of([[]]).padded(4)
    x = torch.randn(4, 2, 16)
    with pytest.raises(ValueError, match=r"k: the plan is for \[4, heads, head dim\], found \[3, 2, 16\]"):
        flex_attention_packed(x, x[:3], x, plan_flex(ranges))
    with pytest.raises(ValueError, match="no backward on a CPU"):
        flex_attention_packed(x.requires_grad_(), x, x, plan_flex(ranges))
    assert np.isfinite(flex_attention_packed(x.detach(), x.detach(), x.detach(), plan_flex(ranges)).numpy()).all()

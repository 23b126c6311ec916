"""The CPU engine and the dense reference against the mask in words.

Letters: T queries, S keys, N query heads, M key/value heads, H head dim.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from megabagel_kernels.attention.host import host_attention, host_attention_lse, plan_host
from megabagel_kernels.attention.mask import AttentionRanges, dense_mask
from megabagel_kernels.attention.reference import attention_reference
from torch import Tensor

from tests.kernels.attention.packs import Pack, Segment, definition, examples, packs, ranges_of, selections

HEADS = [(1, 1), (2, 1), (6, 2), (4, 1), (5, 1), (6, 1), (7, 1), (8, 4)]


def draw_qkv(ranges: AttentionRanges, heads: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v in fp64, with gradients."""
    shapes = ((ranges.queries, heads[0]), (ranges.keys, heads[1]), (ranges.keys, heads[1]))
    generator = torch.Generator().manual_seed(ranges.queries + 1000 * ranges.keys)
    q, k, v = (torch.randn(*s, head_dim, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)
    return q, k, v


def normal_like(x: Tensor) -> Tensor:
    """Normal numbers in the shape and dtype of x, always the same ones."""
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))


def apart(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float, float]:
    """Largest errors of out, of lse and of the gradients, each relative to the largest element of their kind.

    The three gradients share one scale: where a query sees a single key, those of q and k are exactly 0.
    """

    def worst(few: slice) -> float:
        pairs = [(x.double(), y) for x, y in zip(found[few], expected[few], strict=True) if y.numel()]
        largest = max((float(y.abs().max()) for _, y in pairs), default=1.0)
        return max((float((x - y).abs().max()) for x, y in pairs), default=0.0) / (largest or 1.0)

    return worst(slice(0, 1)), worst(slice(1, 2)), worst(slice(2, 5))


def results(attention: Any, qkv: tuple[Tensor, ...], dtype: torch.dtype, grad: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv of `attention` computed from inputs of `dtype`."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv]
    out, lse = attention(*inputs)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


@examples(200)
@given(packs(longest=30), st.integers(0, 3), st.sampled_from(HEADS), st.sampled_from([32, 64, 72, 80]), st.data())
def test_forward_and_backward_match_the_reference(
    pack: Pack, padding: int, heads: tuple[int, int], head_dim: int, data: st.DataObject
):
    whole = ranges_of(pack).padded(padding)
    ranges = whole.take(data.draw(selections(whole.queries)), data.draw(selections(whole.keys)))
    qkv = draw_qkv(ranges, heads, head_dim)
    grad = normal_like(qkv[0])
    plan = plan_host(ranges)
    expected = results(lambda *x: attention_reference(*x, ranges), qkv, torch.float64, grad)
    exact = results(lambda *x: host_attention_lse(*x, plan), qkv, torch.float64, grad)
    single = results(lambda *x: host_attention_lse(*x, plan), qkv, torch.float32, grad)

    blind = torch.from_numpy(~dense_mask(ranges).any(1))
    for found in (expected, exact, single):
        assert not found[0][blind].any() and bool((found[1][:, blind] == -torch.inf).all())
        found[1] = found[1][:, ~blind]
    assert max(apart(exact, expected)) < 1e-13
    assert max(apart(single, expected)) < 2e-6


@examples(60)
@given(packs(longest=6))
@example([])
def test_reference_is_the_definition(pack: Pack):
    """Row by row, from the mask in words and the formula of attention alone."""
    mask, ranges = definition(pack), ranges_of(pack)
    q, k, v = (x.detach() for x in draw_qkv(ranges, (4, 2), 8))
    out, lse = attention_reference(q, k, v, ranges, scale=0.5)
    assert out.shape == q.shape and lse.shape == (4, ranges.queries)
    for i in range(ranges.queries):
        seen = mask[i].nonzero()[0]
        for head in range(4):
            score = torch.exp(0.5 * k[seen, head // 2] @ q[i, head])
            assert torch.allclose(out[i, head], score @ v[seen, head // 2] / score.sum(), rtol=1e-12, atol=1e-14)
            assert torch.allclose(lse[head, i], score.sum().log(), rtol=1e-12, atol=1e-14)


def test_reference_lse_has_a_gradient_and_blind_rows_have_none():
    ranges = ranges_of([[Segment(3, "causal"), Segment(2, "noise")]]).padded(1)
    q, k, v = draw_qkv(ranges, (2, 1), 4)

    def attention(*inputs: Tensor) -> Tensor:
        out, lse = attention_reference(*inputs, ranges)
        return out.sum(2).T + lse.nan_to_num(neginf=0)

    assert torch.autograd.gradcheck(attention, (q, k, v))
    dq, dk, _ = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    assert not dq[5].any() and not dk[5].any()


def test_long_splits_and_rows_that_see_nothing_in_a_whole_block_of_keys():
    """Longer than any block inside the flash kernel, and a tiny sample that shares a tile with a row of many keys."""
    long = [Segment(700, "causal"), Segment(600, "full"), Segment(530, "noise")]
    ranges = ranges_of([long, [Segment(700, "full"), Segment(1, "causal")], [Segment(1, "causal")]])
    qkv = draw_qkv(ranges, (2, 1), 32)
    grad = normal_like(qkv[0])
    plan = plan_host(ranges)
    masks = [mask for tile in plan.tiles if (mask := tile.mask(torch.float32)) is not None]
    assert any(bool(mask[:, :512].isneginf().all(1).any()) for mask in masks if mask.shape[1] > 512)
    expected = results(lambda *x: attention_reference(*x, ranges), qkv, torch.float64, grad)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        assert max(apart(results(lambda *x: host_attention_lse(*x, plan), qkv, dtype, grad), expected)) < bound


@pytest.fixture
def ranges() -> AttentionRanges:
    """Two samples with every kind of split, and padding, in a shuffled order."""
    first = [Segment(9, "causal"), Segment(16, "full"), Segment(16, "noise"), Segment(5, "causal")]
    second = [Segment(20, "noise", 0, chained=True), Segment(7, "full"), Segment(20, "noise", 1, chained=True)]
    whole = ranges_of([first, second, [Segment(1, "causal")]]).padded(6)
    order = np.random.default_rng(3).permutation(whole.queries)
    return whole.take(order, order)


def test_padding_may_hold_nan(ranges: AttentionRanges):
    plan = plan_host(ranges)
    qkv = [x.detach().float() for x in draw_qkv(ranges, (4, 2), 32)]
    blind = torch.from_numpy(ranges.key_code == -1)
    grad = normal_like(qkv[0])
    grad[blind] = 0
    clean = results(lambda *x: host_attention_lse(*x, plan), tuple(qkv), torch.float32, grad)
    for x in (*qkv, grad):
        x[blind] = torch.nan
    dirty = results(lambda *x: host_attention_lse(*x, plan), tuple(qkv), torch.float32, grad)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all(not x[blind].any() for x in (dirty[0], *dirty[2:]))


@pytest.mark.parametrize("threads", [1, 2])
def test_same_inputs_give_the_same_bits(ranges: AttentionRanges, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        qkv = draw_qkv(ranges, (6, 2), 64)
        grad = normal_like(qkv[0])
        runs = [
            results(lambda *x: host_attention_lse(*x, plan_host(ranges)), qkv, torch.float32, grad) for _ in range(5)
        ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_bf16_is_computed_in_fp32_and_rounded_once(ranges: AttentionRanges):
    plan = plan_host(ranges)
    qkv = tuple(x.detach().bfloat16() for x in draw_qkv(ranges, (4, 2), 32))
    grad = normal_like(qkv[0])
    low = results(lambda *x: host_attention_lse(*x, plan), qkv, torch.bfloat16, grad)
    high = results(lambda *x: host_attention_lse(*x, plan), qkv, torch.float32, grad)
    assert low[1].dtype == torch.float32 and torch.equal(low[1], high[1])
    for index in (0, 2, 3, 4):
        assert low[index].dtype == torch.bfloat16 and torch.equal(low[index], high[index].bfloat16())


def test_slices_of_a_fused_projection_and_a_scale(ranges: AttentionRanges):
    plan = plan_host(ranges)
    fused = normal_like(torch.empty(ranges.queries, 8, 32)).requires_grad_()
    expected, _ = attention_reference(*fused.split([4, 2, 2], 1), ranges, scale=0.3)
    found = host_attention(*fused.split([4, 2, 2], 1), plan, scale=0.3)
    assert torch.allclose(found, expected, rtol=0, atol=2e-6)
    gradients = [torch.autograd.grad(out, fused, normal_like(out))[0] for out in (found, expected)]
    assert torch.allclose(*gradients, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("queries", "keys"), [(0, 10), (10, 0), (0, 0)])
def test_no_queries_or_no_keys(ranges: AttentionRanges, queries: int, keys: int):
    part = ranges.take(np.arange(queries), np.arange(keys))
    q, k, v = draw_qkv(part, (2, 1), 32)
    out, lse = host_attention_lse(q, k, v, plan_host(part))
    assert out.shape == q.shape and not out.any()
    assert lse.shape == (2, queries) and bool((lse == -torch.inf).all())
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape] and not any(x.any() for x in gradients)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((90, 4, 32), (95, 2, 32), (95, 2, 32)), r"q: the plan is for \[95, heads, head dim\], found \[90, 4, 32\]"),
        (((95, 4, 32), (90, 2, 32), (90, 2, 32)), r"k: the plan is for \[95, heads, head dim\], found \[90, 2, 32\]"),
        (((95, 4, 32), (95, 2, 32), (95, 64)), r"v: the plan is for \[95, heads, head dim\], found \[95, 64\]"),
        (((95, 4, 32), (95, 2, 16), (95, 2, 16)), r"q and k: .* \[95, 4, 32\] and torch.float32 \[95, 2, 16\]"),
        (((95, 4, 32), (95, 3, 32), (95, 3, 32)), "4 query heads, 3 key heads, 3 value heads"),
        (((95, 4, 32), (95, 2, 32), (95, 1, 32)), "4 query heads, 2 key heads, 1 value heads"),
    ],
)
def test_wrong_shapes_are_named(ranges: AttentionRanges, shapes: tuple[tuple[int, ...], ...], message: str):
    with pytest.raises(ValueError, match=message):
        host_attention(*(torch.zeros(shape) for shape in shapes), plan_host(ranges.take(range(95), range(95))))


def test_mixed_dtypes_are_named(ranges: AttentionRanges):
    q, k, v = (x.detach() for x in draw_qkv(ranges, (2, 1), 32))
    with pytest.raises(ValueError, match=r"q and v: .* found torch.float64 .* and torch.float32"):
        host_attention(q, k, v.float(), plan_host(ranges))


def plain_ranges(start: int, stop: int, queries: int, keys: int = 9) -> AttentionRanges:
    """All queries see the public codes start to stop of `keys` keys."""
    bounds = (np.full(queries, bound, np.int32) for bound in (start, stop, 0, 0))
    return AttentionRanges(np.arange(keys, dtype=np.int32), *bounds)


@pytest.mark.parametrize("queries", [0, 1, 5])
@pytest.mark.parametrize(("start", "stop"), [(0, 9), (0, 6), (3, 9), (2, 4), (4, 4)])
def test_without_gradient_the_bits_are_the_same(start: int, stop: int, queries: int):
    """Masks that one call or a view might serve: all keys, the first or last ones, none; no queries."""
    part = plain_ranges(start, stop, queries)
    q, k, v = (x.detach().float() for x in draw_qkv(part, (4, 2), 32))
    expected = host_attention(q.requires_grad_(), k, v, plan_host(part))
    with torch.no_grad():
        found = host_attention(q, k, v, plan_host(part))
    assert torch.equal(found, expected)


def test_without_gradient_a_pack_has_the_same_bits(ranges: AttentionRanges):
    q, k, v = (x.detach().float() for x in draw_qkv(ranges, (4, 2), 32))
    expected = host_attention(q.requires_grad_(), k, v, plan_host(ranges))
    with torch.no_grad():
        assert torch.equal(host_attention(q, k, v, plan_host(ranges)), expected)

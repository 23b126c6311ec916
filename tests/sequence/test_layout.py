"""Compact [und | gen] layout on context-parallel ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megabagel_kernels.attention.mask import dense_mask, visible_pairs, visible_per_query

from megabagel.errors import UserError
from megabagel.sequence.items import Item, Latent, Text, Vit
from megabagel.sequence.layout import Layout, build_layout, layout_rows
from megabagel.sequence.pack import Pack
from megabagel.sequence.sample import LATENT
from tests.support.oracle import mask_of, places_of
from tests.support.strategies import examples, lay_end_to_end, packs

CHUNK = st.sampled_from([1, 2, 3, 4, 8, 16])
CP = st.integers(1, 4)


def laid_out(pack: Pack, max_tokens: int, chunk: int, cp: int) -> Layout:
    """The layout of a run whose packs hold at most `max_tokens`."""
    return build_layout(pack, layout_rows(max_tokens, chunk, cp), chunk, cp)


def check_rules(layout: Layout, pack: Pack, chunk: int, cp: int) -> None:
    """Everything that ranks rely on."""
    placed = layout.token_K[layout.token_K >= 0]
    assert sorted(placed.tolist()) == list(range(pack.tokens))  # every token exactly once
    assert layout.cp == len(layout.num_und) == cp
    assert layout.rows * cp == len(layout.token_K)
    assert np.array_equal(np.concatenate([layout.rank(rank) for rank in range(cp)]), layout.token_K)
    for rank, border in enumerate(layout.num_und):
        token_T = layout.rank(rank)
        assert len(token_T) == layout.rows
        assert border % chunk == 0 and layout.rows % chunk == 0
        assert chunk <= border <= layout.rows - chunk  # at least one chunk of either kind
        und, gen = (part[part >= 0] for part in (token_T[:border], token_T[border:]))
        assert (pack.kind_S[und] != LATENT).all() and (pack.kind_S[gen] == LATENT).all()
        assert (np.diff(und) > 0).all()  # delimiters stay among the words
        order = [(pack.sample_S[token], pack.noised_S[token], token) for token in gen]
        assert order == sorted(order)  # clean before noised inside a sample


@examples(300)
@given(packs(), CHUNK, CP, st.integers(0, 40))
def test_any_pack_on_any_grid(drawn, chunk, cp, room):
    check_rules(laid_out(drawn.pack, drawn.pack.tokens + room, chunk, cp), drawn.pack, chunk, cp)


@examples(400)
@given(packs(), CHUNK, CP, st.integers(0, 40))
def test_the_mask_in_row_order_is_the_permuted_mask(drawn, chunk, cp, room):
    pack = drawn.pack
    layout, mask = laid_out(pack, pack.tokens + room, chunk, cp), mask_of(places_of(drawn.tokens))
    expected = np.zeros((len(layout.token_K),) * 2, bool)  # padding sees nothing and is seen by none
    real = np.flatnonzero(layout.token_K >= 0)
    expected[np.ix_(real, real)] = mask[np.ix_(layout.token_K[real], layout.token_K[real])]
    pairs = 0
    for rank in range(cp):
        codes = layout.codes(pack, rank)
        rows = slice(rank * layout.rows, (rank + 1) * layout.rows)
        assert np.array_equal(dense_mask(codes), expected[rows])
        assert np.array_equal(visible_per_query(codes), expected[rows].sum(1))
        pairs += visible_pairs(codes)
    assert pairs == mask.sum()


WINDOW = 96


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 5, 8, 16, 64])
def test_a_full_window_fits_whatever_its_share_of_latents(chunk, cp):
    for latents in range(1, WINDOW - 3):
        items: list[Item] = [Text(0, WINDOW - 4 - latents), Latent(1, 1, latents, noised=latents % 2 == 0)]
        pack = lay_end_to_end([items]).pack
        assert (pack.tokens, pack.tokens_gen) == (WINDOW, latents)
        check_rules(laid_out(pack, WINDOW, chunk, cp), pack, chunk, cp)


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "items",
    [
        [Text(0, WINDOW - 2, loss=True)],
        [Text(0, 0)],
        [Vit(0, 1, WINDOW - 2)],
        [Latent(0, 1, WINDOW - 2, noised=True)],
        [Latent(0, 1, WINDOW // 2 - 2, noised=True), Latent(0, 1, WINDOW // 2 - 2, noised=False)],
        [Latent(slot, 1, 1, noised=slot % 2 == 0) for slot in range(WINDOW // 3)],
    ],
)
def test_one_sided_packs(items, cp):
    pack = lay_end_to_end([items]).pack
    for chunk in (1, 8, 16):
        check_rules(laid_out(pack, WINDOW, chunk, cp), pack, chunk, cp)


@examples(100)
@given(st.integers(1, 50_000), st.sampled_from([1, 16, 128, 512]), st.integers(1, 8))
def test_rows_are_a_constant_of_the_run_and_little_more_than_its_window(max_tokens, chunk, cp):
    rows = layout_rows(max_tokens, chunk, cp)
    assert rows % (chunk * cp) == 0
    assert max_tokens + chunk * cp <= rows < max_tokens + 2 * chunk * cp


def test_a_pack_that_is_too_long_is_refused():
    pack = lay_end_to_end([[Text(0, 62), Latent(1, 1, 62, noised=True)]]).pack
    with pytest.raises(UserError, match="66 und and 62 gen tokens does not fit into 96 rows"):
        laid_out(pack, 64, chunk=16, cp=2)

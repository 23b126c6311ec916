"""Pages of the KV cache, and the choice of tokens."""

import numpy as np
import pytest
import torch

from megabagel.errors import UserError
from megabagel.inference.cache import PAGE, Arena, KVCache
from megabagel.inference.decoding import TextSettings, choose, probabilities


def cache(pages: int = 6) -> KVCache:
    return KVCache(range(2), pages, 1, 4, torch.float32, torch.device("cpu"))


def test_rows_of_different_requests_never_meet() -> None:
    pool = cache()
    arenas = [Arena(pool) for _ in range(3)]
    rng, taken = np.random.default_rng(0), [np.zeros(0, np.int64)] * 3
    for turn in range(12):
        taken[turn % 3] = np.concatenate([taken[turn % 3], arenas[turn % 3].take(int(rng.integers(1, 31)))])
    rows = np.concatenate(taken)
    assert len(np.unique(rows)) == len(rows) and rows.max() < pool.rows


def test_pages_come_back_and_are_counted() -> None:
    pool = cache()
    first, second = Arena(pool), Arena(pool)
    first.take(PAGE + 1)
    second.take(3 * PAGE)
    assert pool.free_pages == 1
    with pytest.raises(UserError, match=f"KV cache: {2 * PAGE} rows wanted, {PAGE} of {6 * PAGE} are free"):
        second.take(2 * PAGE)
    first.close()
    assert pool.free_pages == 3
    second.take(2 * PAGE)
    second.close()
    assert pool.free_pages == 6


def test_scratch_rows_are_taken_again() -> None:
    arena = Arena(cache())
    first = arena.take(10)
    arena.give_back(first)
    assert arena.take(10).tolist() == first.tolist()


def test_free_pages_side_by_side_come_first() -> None:
    pool = cache()
    pages = [pool.take(1) for _ in range(6)]
    for page in (pages[0], pages[2], pages[4], pages[5]):
        pool.give_back(page)
    assert pool.take(2).tolist() == [4, 5]
    assert pool.take(2).tolist() == [0, 2]


def test_greedy_takes_the_likeliest_and_a_cold_draw_agrees() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert choose(logits, TextSettings(), 0) == 1
    assert choose(logits, TextSettings(temperature=0.01, seed=3), 0) == 1


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    settings = TextSettings(temperature=0.7, seed=1)
    drawn = [choose(logits, settings, number) for number in range(1000)]
    assert drawn == [choose(logits, settings, number) for number in range(1000)]
    shares = np.bincount(drawn, minlength=4) / 1000
    assert np.abs(shares - probabilities(logits, 0.7).numpy()).max() < 0.05
    assert drawn[:50] != [choose(logits, TextSettings(temperature=0.7, seed=2), number) for number in range(50)]


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.25, 0.15]))
    for top_p, kept in ((0.4, {1}), (0.6, {1, 2}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        settings = TextSettings(temperature=1.0, top_p=top_p)
        assert {choose(logits, settings, number) for number in range(400)} == kept


def test_stop_texts_are_ids_at_the_end() -> None:
    settings = TextSettings(stop=((4, 5),))
    assert settings.stops([1, 4, 5]) and not settings.stops([4, 5, 1]) and not settings.stops([5])


@pytest.mark.parametrize(
    ("options", "says"),
    [({"max_new_tokens": 0}, "max_new_tokens=0"), ({"temperature": -1}, "temperature=-1"), ({"top_p": 0}, "top_p=0")],
)
def test_settings_without_meaning_are_refused(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        TextSettings(**options)

"""A pack is its samples end to end, and every token knows its row in its content stream."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabagel.data.tokenize.token_ids import Writer
from megabagel.sequence.items import Item, Latent, Text, Vit
from megabagel.sequence.sample import LATENT, TEXT, VIT
from tests.support.oracle import Token
from tests.support.strategies import examples, lay_end_to_end, packs

KIND = {"word": TEXT, "patch": VIT, "latent": LATENT}


class Letters:
    """A tokenizer of special tokens only."""

    def token_id(self, name: str) -> int:
        return {"<|im_start|>": 1, "<|im_end|>": 2, "<|vision_start|>": 3, "<|vision_end|>": 4}[name]


def word_id(word: str) -> int:
    """A number for a word of `definition.Token`."""
    if ":" not in word:
        return {"bos": 1, "eos": 2, "soi": 3, "eoi": 4}[word]
    slot, number = map(int, word.split(":"))
    return 1000 + 100 * slot + number


def written(samples: list[list[Item]]) -> list[int]:
    """The word stream of a pack, as the data side writes it."""
    lengths = [{item.slot: item.length for item in items if isinstance(item, Text)} for items in samples]
    writer = Writer(Letters())  # type: ignore[arg-type]
    return [
        word
        for items, length in zip(samples, lengths, strict=True)
        for word in writer.words(items, lambda slot, n=length: [word_id(f"{slot}:{i}") for i in range(n[slot])])
    ]


def flat(tokens: list[list[Token]]) -> list[Token]:
    """Tokens of all samples."""
    return [token for sample in tokens for token in sample]


@examples(200)
@given(packs())
def test_rows_and_counts(drawn):
    pack, _, samples = drawn
    tokens = flat(samples)
    assert pack.tokens == len(tokens)
    assert pack.kind_S.tolist() == [KIND[token.kind] for token in tokens]
    assert pack.position_S.tolist() == [token.position for token in tokens]
    assert pack.ce_S.tolist() == [bool(token.label) for token in tokens]
    assert pack.noised_S.tolist() == [token.flow for token in tokens]
    assert pack.sample_S.tolist() == [number for number, sample in enumerate(samples) for _ in sample]
    assert pack.ce_tokens == sum(bool(token.label) for token in tokens)
    assert pack.mse_tokens == sum(token.flow for token in tokens)
    assert pack.tokens_gen == sum(token.kind == "latent" for token in tokens)


@examples(200)
@given(packs())
def test_content_streams(drawn):
    """Words, patches and latents each lie in token order, and the word after a row with loss is its label."""
    pack, items, samples = drawn
    tokens, words = flat(samples), written(items)
    for kind, number in KIND.items():
        assert pack.fill_S[pack.kind_S == number].tolist() == list(range(sum(t.kind == kind for t in tokens)))
    said = [word_id(token.word) for token in tokens if token.kind == "word"]
    assert [words[row] for row in pack.fill_S[pack.kind_S == TEXT]] == said
    labels = [word_id(token.label) for token in tokens if token.label]
    assert [words[row + 1] for row in pack.fill_S[pack.ce_S]] == labels


@pytest.mark.parametrize(
    "items",
    [
        [Text(0, 3, loss=True)],
        [Vit(0, 1, 2)],
        [Latent(0, 1, 2, noised=False)],
        [Latent(0, 1, 2, noised=True)],
    ],
)
def test_packs_of_one_kind_only(items):
    pack, _, samples = lay_end_to_end([items, items])
    tokens = flat(samples)
    assert pack.kind_S.tolist() == [KIND[token.kind] for token in tokens]
    assert pack.noised_S.tolist() == [token.flow for token in tokens]
    assert pack.fill_S.dtype == np.int64


@examples(100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_latents_are_those_of_the_samples_in_order(counts):
    samples: list[list[Item]] = [
        [Text(9, 1), *(Latent(slot, 1, 1, noised=True) for slot in range(count))] for count in counts
    ]
    pack = lay_end_to_end(samples).pack
    assert pack.latents == [image for sample in pack.samples for image in sample.latents]
    assert [image.slot for image in pack.latents] == [slot for count in counts for slot in range(count)]
    assert len({image.noise_seed for image in pack.latents}) == sum(counts)

"""Sizes from items alone, against packs laid out and against the mask written out."""

from hypothesis import given

from megabagel.sequence.items import Clip, Latent, Text, Vit
from megabagel.sequence.sizes import Size, pack_size, sample_size, total
from tests.support.oracle import mask_of, places_of
from tests.support.strategies import examples, packs


def test_a_sample_counted_by_hand():
    items = [
        Text(0, 3, loss=True),  # 5 tokens
        Latent(1, 2, 3, noised=True),  # 8, private
        Latent(1, 2, 3, noised=False),  # 8
        Vit(1, 2, 2),  # 6
        Text(2, 4),  # dropped
        Clip((Latent(3, 1, 2, noised=True),) * 2, (1, 1), chain=0),  # 8, private
        Clip((Latent(4, 1, 1, noised=True),), (1,), chain=0),  # 3, private, sees the group before
    ]
    visible = 15 + 8 * (5 + 8) + 8 * (5 + 8) + 6 * (13 + 6) + 8 * (19 + 8) + 3 * (19 + 8 + 3)
    assert sample_size(items, {4}) == Size(
        samples=1,
        tokens=38,
        tokens_gen=6 + 6 + 4 + 1,
        ce_tokens=4,
        mse_tokens=6 + 4 + 1,
        visible=visible,
        squares=38**2,
        patches=4,
        patch_squares=16,
        encoded=6 + 2 + 1,
        encoded_squares=36 + 4 + 1,
        vit_images=1,
        vae_images=3,
    )


@examples(200)
@given(packs())
def test_sizes_of_items_are_those_of_the_pack_laid_out(drawn):
    size = total(sample_size(sample.items, ()) for sample in drawn.pack.samples)  # what dropout left
    assert size == pack_size(drawn.pack)
    assert size.visible == mask_of(places_of(drawn.tokens)).sum()


def test_nothing_is_empty():
    assert total([]) == Size() and sample_size([], ()) == Size(samples=1)

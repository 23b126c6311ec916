"""Which images a pack needs, who encodes them, and where each latent token finds its x_0."""

from hypothesis import given
from hypothesis import strategies as st

from megabagel.config.schema import Config, DataConfig, ParallelConfig
from megabagel.sequence.images import ImageShares, index_latents, vae_images, vit_images
from megabagel.sequence.items import Clip, Item, Latent, Text, Vit
from megabagel.sequence.rank_rows import RankPack, RankPlace
from tests.support.strategies import examples, lay_end_to_end, packs


@examples(200)
@given(packs())
def test_images_are_distinct_and_in_order_of_first_use(drawn):
    pack, _, samples = drawn
    first_uses = list(
        dict.fromkeys(
            (number, token.image[0])
            for number, sample in enumerate(samples)
            for token in sample
            if token.kind == "latent"
        )
    )
    assert [(image.sample, image.slot) for image in vae_images(pack)] == first_uses
    seen = [(number, item) for number, items in enumerate(drawn.items) for item in items if isinstance(item, Vit)]
    assert vit_images(pack) == seen


def test_an_image_that_is_used_again_later_keeps_its_first_place():
    again: list[Item] = [Latent(slot, 1, slot + 1, noised) for slot, noised in ((0, True), (1, True), (0, False))]
    pack = lay_end_to_end([[Text(9, 1)], again, again[:1]]).pack
    found = [(image.sample, image.slot, image.tokens) for image in vae_images(pack)]
    assert found == [(1, 0, 1), (1, 1, 2), (2, 0, 1)]


@examples(200)
@given(packs())
def test_every_latent_token_finds_its_image_its_place_and_its_x0(drawn):
    pack, _, samples = drawn
    # x_0 of every distinct image, end to end, as (sample, slot, place)
    x0 = [(image.sample, image.slot, place) for image in vae_images(pack) for place in range(image.tokens)]
    wanted = [(number, *t.image) for number, sample in enumerate(samples) for t in sample if t.kind == "latent"]
    index = index_latents(pack)
    assert [x0[row] for row in index.start_I[index.image_L] + index.place_L] == wanted
    assert index.place_L.tolist() == [place for *_, place in wanted]
    assert [pack.latents[image].slot for image in index.image_L] == [slot for _, slot, _ in wanted]
    flow = [t.flow for sample in samples for t in sample if t.kind == "latent"]
    assert [pack.latents[image].noised for image in index.image_L] == flow


def test_frames_of_a_clip_are_images_of_their_own():
    frames = (Latent(4, 1, 2, noised=True), Latent(2, 1, 1, noised=True))
    pack = lay_end_to_end([[Clip(frames, (1, 1), chain=0), Latent(2, 1, 1, noised=False)]]).pack
    index = index_latents(pack)
    assert [image.slot for image in vae_images(pack)] == [4, 2]
    assert (index.image_L.tolist(), index.place_L.tolist()) == ([0, 0, 1, 2], [0, 1, 0, 0])
    assert index.start_I.tolist() == [0, 2, 2]


def test_a_pack_without_latents_has_an_empty_index():
    pack = lay_end_to_end([[Text(0, 3), Vit(1, 2, 2)]]).pack
    index = index_latents(pack)
    assert vae_images(pack) == []
    assert len(index.image_L) == len(index.place_L) == len(index.start_I) == 0


@examples(100)
@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 8))
def test_shares_are_a_partition(costs, ranks):
    found = ImageShares.of(costs, ranks)
    assert len(found.dealt) == ranks
    assert sorted(number for part in found.dealt for number in part) == list(range(len(costs)))
    owner = {number: rank for rank, part in enumerate(found.dealt) for number in part}
    tokens = [(image, place) for image, cost in enumerate(costs) for place in range(cost)]
    gathered = [(-1, -1)] * (ranks * found.rows)
    for rank in range(ranks):
        own = [tokens[number] for number in found.tokens(rank)]
        assert own == [token for token in tokens if owner[token[0]] == rank] and len(own) <= found.rows
        gathered[rank * found.rows : rank * found.rows + len(own)] = own
    assert [gathered[row] for row in found.gathered_row()] == tokens


@examples(50)
@given(packs(), st.integers(1, 3), st.integers(1, 2))
def test_every_image_has_one_encoder_in_the_first_stage(drawn, cp, tp):
    pack = drawn.pack
    config = Config(data=DataConfig(max_tokens=pack.tokens + 8), parallel=ParallelConfig(tp=tp, cp=cp, chunk=4))
    stage = [[RankPack.of(pack, config, RankPlace(t, c)) for t in range(tp)] for c in range(cp)]
    encoded = [image for ranks in stage for rank in ranks for image in rank.vae_images]
    assert sorted(encoded, key=vae_images(pack).index) == vae_images(pack)
    seen = [image for ranks in stage for image in ranks[0].vit_images]
    assert sorted(seen, key=vit_images(pack).index) == sorted(vit_images(pack), key=vit_images(pack).index)
    assert all(rank.vit_images == ranks[0].vit_images for ranks in stage for rank in ranks)
    later = RankPack.of(pack, config, RankPlace(first=False))
    assert later.vae_images == later.vit_images == []

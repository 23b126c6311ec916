"""FLOP counts against every matrix product written out (docs/bagel.md#flops, #sizes)."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from megabagel.config.schema import ModelConfig, VitConfig
from megabagel.sequence.flops import Flops, branch_parameters, count_flops
from megabagel.sequence.items import Item, Latent, Text, Vit
from megabagel.sequence.sizes import pack_size
from tests.support.oracle import mask_of, places_of
from tests.support.strategies import examples, lay_end_to_end, packs

BAGEL_7B = ModelConfig(
    layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944, vocab=152064, vit=VitConfig(26, 1152, 16, 4304)
)
SMALL = ModelConfig(
    layers=3, hidden=40, heads=6, kv_heads=2, head_dim=8, ffn=56, vocab=70, vit=VitConfig(layers=2, hidden=24, ffn=36)
)
"""Every size differs, so that no two can be mixed up."""


def product(rows: float, inner: float, columns: float) -> float:
    """FLOPs of a matrix product, forward and backward (twice the forward)."""
    return 3 * 2 * rows * inner * columns


def branch(model: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of all weights of one layer of one expert (docs/bagel.md#tensor-names)."""
    queries, keys = model.heads * model.kv_channels, model.kv_heads * model.kv_channels
    shapes: list[tuple[int, ...]] = [
        *((out, model.hidden) for out in (queries, keys, keys)),
        (model.hidden, queries),
        *((model.ffn, model.hidden),) * 2,
        (model.hidden, model.ffn),
        *((model.hidden,),) * 2,
    ]
    shapes += [(queries,), (keys,), (keys,)] if model.qkv_bias else []
    return shapes + ([(model.kv_channels,)] * 2 if model.qk_norm else [])


def sizes(shapes: list[tuple[int, ...]]) -> int:
    """Numbers in all of them."""
    return sum(int(np.prod(shape)) for shape in shapes)


def test_the_branch_of_7b_is_the_published_one():
    """Its layers and its final norm, like the generation branch of the checkpoint."""
    assert round(sizes(branch(BAGEL_7B)) / 1e6, 2) == 233.06
    assert branch_parameters(BAGEL_7B) == 6_525_625_344 + 3_584 == 6_525_628_928


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("variant", ["dense", "moe", "mot"])
def test_a_token_meets_one_expert_in_every_variant(variant, qk_norm, qkv_bias):
    model = replace(SMALL, variant=variant, qk_norm=qk_norm, qkv_bias=qkv_bias)
    assert branch_parameters(model) == model.layers * sizes(branch(model)) + model.hidden


def test_the_official_convention_at_7b():
    """6 x (branch + embedding + head) per token, and 12 x heads x head_dim x layers x samples' lengths squared."""
    items: list[Item] = [Text(0, 98), Latent(1, 30, 30, noised=True)]
    pack = lay_end_to_end([items, [Text(0, 498)]]).pack
    per_token = 6 * (6_525_628_928 + 544_997_376 + 544_997_376)
    expected = per_token * 1502 + 12 * 28 * 128 * 28 * (1002**2 + 500**2)
    assert count_flops(pack_size(pack), BAGEL_7B).official == pytest.approx(expected, rel=1e-12)


@examples(100)
@given(packs())
def test_any_pack_from_its_shapes(drawn):
    model = SMALL
    weights = model.layers * sizes(branch(model)) + model.hidden + 2 * model.vocab * model.hidden
    dense = product(drawn.pack.tokens, weights, 1)
    per_pair = model.layers * model.heads * 2 * product(1, model.kv_channels, 1)  # scores, and their sum over values
    flops = count_flops(pack_size(drawn.pack), model)
    squares = sum(len(sample) ** 2 for sample in drawn.tokens)
    assert flops.official == pytest.approx(dense + per_pair * squares, rel=1e-12)
    assert flops.masked == pytest.approx(dense + per_pair * mask_of(places_of(drawn.tokens)).sum(), rel=1e-12)
    assert flops.vit == pytest.approx(sum(_tower(v, model) for items in drawn.items for v in items), rel=1e-12)
    cells = len({(i, t.image) for i, sample in enumerate(drawn.tokens) for t in sample if t.kind == "latent"})
    assert flops.vae == pytest.approx(cells * 16**2 * 3 * 2 * 2 * 8)  # an image once, two passes of 8 per pixel value


def _tower(item: Item, model: ModelConfig) -> float:
    """ViT tower and connector for one image."""
    if not isinstance(item, Vit):
        return 0.0
    vit, n = model.vit, item.rows * item.cols
    projections = 4 * product(n, vit.hidden, vit.hidden) + 2 * product(n, vit.hidden, vit.ffn)
    attention = 2 * product(n, vit.hidden, n)
    ends = product(n, 3 * vit.patch**2, vit.hidden)
    connector = product(n, vit.hidden, model.hidden) + product(n, model.hidden, model.hidden)
    return ends + vit.layers * (projections + attention) + connector


def test_masked_pairs_never_exceed_squares():
    pack = lay_end_to_end([[Text(0, 10), Latent(1, 2, 2, noised=True), Text(2, 3)]]).pack
    flops = count_flops(pack_size(pack), SMALL)
    assert 0 < flops.masked < flops.official


def test_flops_add_up():
    assert Flops(1, 2, 3, 4) + Flops(10, 20, 30, 40) == Flops(11, 22, 33, 44)

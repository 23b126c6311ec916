"""The plan's FLOP count beside torch's own counter, over a whole model forward and backward."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import model_step
from megabagel.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, VitConfig
from megabagel.model.vae_blocks import BlockCodec
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.mesh import distributed
from megabagel.sequence.flops import TRAIN, count_flops, needed_flops
from megabagel.sequence.items import Item, Latent, Text, Vit
from megabagel.sequence.sizes import Size, pack_size

SAMPLES: list[list[Item]] = [
    [Text(0, 21), Latent(1, 6, 5, noised=True)],
    [Latent(0, 7, 6, noised=False), Vit(0, 7, 7), Text(1, 33), Latent(2, 5, 4, noised=True)],
    [Vit(0, 5, 8), Text(1, 40), Text(2, 110, loss=True)],
    [Text(0, 90, loss=True)],
]
MODEL = ModelConfig(
    layers=3, hidden=192, heads=6, kv_heads=2, ffn=512, vocab=1024, vit=VitConfig(layers=2, hidden=96, heads=2, ffn=256)
)


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_step, "SAMPLES", SAMPLES)


@pytest.mark.usefixtures("samples")
def test_matrix_products_equal_those_that_torch_counts() -> None:
    """Attention aside, which the counter charges in full whatever the mask."""
    config = Config(model=MODEL, data=DataConfig(max_tokens=2000), parallel=ParallelConfig(chunk=1))
    batch = model_step.draw_batch(config)
    exact = dataclasses.replace(config, data=DataConfig(max_tokens=batch.pack.tokens))  # no padding
    batch = model_step.draw_batch(exact)
    model = model_step.build_model(MODEL)
    with distributed(exact) as mesh:
        builder = InputBuilder(exact, mesh, BlockCodec(), torch.device("cpu"))
        inputs = builder.build(batch)
    counter = FlopCounterMode(display=False)
    with counter:
        model_step.step(model, inputs)
    counted = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    size = pack_size(batch.pack)
    per_pair = 4 * TRAIN
    attention = per_pair * MODEL.layers * MODEL.heads * MODEL.kv_channels * size.visible
    attention += per_pair * MODEL.vit.layers * MODEL.vit.hidden * size.patch_squares
    assert needed_flops(batch.pack, MODEL) - attention == pytest.approx(counted, rel=0.01)


def test_attention_over_full_images_equals_what_torch_counts() -> None:
    """Where everything is visible a written-out attention is what the formula means; fused calls are charged for the
    scores that they make again."""
    tokens, heads, width = 30, 6, 32
    q = torch.randn(1, heads, tokens, width, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        (q @ q.transpose(2, 3)).softmax(3).matmul(q).sum().backward()
    model = dataclasses.replace(MODEL, layers=1, heads=heads, hidden=heads * width)
    all_visible, none = (count_flops(Size(tokens=tokens, visible=pairs), model).masked for pairs in (tokens**2, 0))
    assert all_visible - none == counter.get_total_flops()

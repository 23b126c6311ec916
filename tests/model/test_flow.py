"""Timesteps, their embedding, latent tokens and seeded noise against plain definitions and the official numbers."""

import math

import pytest
import torch

from megabagel.model.flow import TimeEmbedder, timestep, timestep_features
from megabagel.model.noise import normal
from megabagel.sequence.patches import patchify, unpatchify


def test_timestep_is_shifted_logit_normal():
    draws = [-3.0, 0.0, 0.7]
    for shift in (1.0, 4.0):
        for t, u in zip(timestep(torch.tensor(draws), shift).tolist(), draws, strict=True):
            odds = shift * math.exp(u)  # the shift multiplies the odds of noise
            assert t == pytest.approx(odds / (1 + odds), rel=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_clean_image_has_timestep_zero_exactly(shift):
    assert timestep(torch.tensor([-math.inf]), shift).item() == 0.0


def test_timestep_features_are_cosines_then_sines_of_unscaled_t():
    t = 0.37
    waves = [10000 ** (-i / 128) for i in range(128)]
    expected = [math.cos(t * w) for w in waves] + [math.sin(t * w) for w in waves]
    assert timestep_features(torch.tensor([0.9, t]))[1].tolist() == pytest.approx(expected, abs=1e-6)


def test_time_embedder_has_the_published_names_and_formula():
    embedder = TimeEmbedder(24)
    assert {name: tuple(p.shape) for name, p in embedder.named_parameters()} == {
        "mlp.0.weight": (24, 256),
        "mlp.0.bias": (24,),
        "mlp.2.weight": (24, 24),
        "mlp.2.bias": (24,),
    }
    with torch.no_grad():
        for i, parameter in enumerate(embedder.parameters()):
            parameter.copy_(0.1 * normal(i, *parameter.shape))
    t_I = torch.tensor([0.0, 0.25, 1.0])
    w0, b0, w2, b2 = (p.detach().double() for p in embedder.parameters())
    inner = timestep_features(t_I).double() @ w0.T + b0
    expected = (inner / (1 + torch.exp(-inner))) @ w2.T + b2
    torch.testing.assert_close(embedder(t_I).double(), expected, rtol=0, atol=1e-5)


def test_time_embedder_in_bf16_tells_close_timesteps_apart():
    """0.5000 and 0.5007 are one number in bf16; their features must be made before the cast."""
    embedder = TimeEmbedder(16).to(torch.bfloat16)
    assert embedder(torch.tensor([0.5])).dtype == torch.bfloat16
    assert torch.tensor(0.5).bfloat16() == torch.tensor(0.5007).bfloat16()
    seen = []
    embedder.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embedder(torch.tensor([0.5, 0.5007]))
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize(("rows", "cols", "channels", "patch"), [(3, 2, 16, 2), (1, 5, 4, 2), (2, 3, 5, 3)])
def test_latent_tokens_are_row_major_with_the_channel_fastest(rows, cols, channels, patch):
    latent_Chw = normal(7, channels, rows * patch, cols * patch)
    tokens_TD = patchify(latent_Chw, patch)
    assert tokens_TD.shape == (rows * cols, patch * patch * channels)
    for r in range(rows):
        for c in range(cols):
            cells = [latent_Chw[:, r * patch + i, c * patch + j] for i in range(patch) for j in range(patch)]
            assert torch.equal(tokens_TD[r * cols + c], torch.cat(cells))
    assert torch.equal(unpatchify(tokens_TD, rows, cols, patch), latent_Chw)


def test_noise_is_a_function_of_every_bit_of_its_seed():
    seeds = [0, 5, 5 + 2**32, 5 + 2**63, 2**64 - 1]
    draws = [normal(seed, 3, 4) for seed in seeds]
    assert all(torch.equal(normal(seed, 3, 4), draw) for seed, draw in zip(seeds, draws, strict=True))
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(seeds)
    assert torch.equal(normal(-1, 3, 4), normal(2**64 - 1, 3, 4))


def test_noise_is_standard_normal():
    x = normal(11, 100_000).double()
    moments = [x.mean(), x.var(), (x**3).mean(), (x**4).mean()]
    assert [float(m) for m in moments] == pytest.approx([0, 1, 0, 3], abs=0.05)


def test_timesteps_in_bf16_have_8_significant_bits():
    draws = torch.linspace(-3, 3, 101)
    exact, rounded = timestep(draws, 4.0), timestep(draws, 4.0, "bf16")
    assert rounded.dtype is torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert 1e-3 < float((rounded / exact - 1).abs().max()) < 2e-2
    assert timestep(torch.tensor([-torch.inf]), 4.0, "bf16").tolist() == [0.0]


def test_official_numbers(golden):
    expect, _ = golden("prim_01_building_blocks")
    for shift in (1.0, 3.0, 4.0):
        t = timestep(expect["timestep/raw"], shift)
        torch.testing.assert_close(t, expect[f"timestep/shifted_{shift}"], rtol=0, atol=1e-7)
    features = timestep_features(expect["timestep/t"])
    torch.testing.assert_close(features, expect["timestep/embedding256"], rtol=0, atol=1e-6)
    cropped = expect["latent/latent"][:, :6, :4]
    assert torch.equal(patchify(cropped, 2), expect["latent/tokens_h3_w2"])

"""Seams that reinforcement learning would use (docs/srum.md#seams-for-reinforcement-learning), one test each."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megabagel.model.flow import timestep
from megabagel.model.inputs import Constraint
from megabagel.model.kernels import TORCH
from megabagel.posttrain.journal import read_records
from megabagel.posttrain.judges import JudgeOptions, judge_of
from megabagel.sequence.items import Latent, Text
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import build_pack
from megabagel.sequence.rank_rows import LatentWeights, RankPack, RankPlace, derive_rows
from megabagel.sequence.sample import LATENT, lay_out


def test_rollouts_are_a_function_of_prompt_and_seed(model: Any) -> None:
    def rollout(seed: int) -> Any:
        request = model.submit_draw(["a cat"], 2, (32, 16), seed, points=3)
        for _ in model.stream(request):
            pass
        return request.done.result

    first, again = rollout(7), rollout(7)
    assert [one.about["seed"] for one in first] == [7, 8] and first[0].about["settings"]["points"] == 3
    assert all((a.pixels == b.pixels).all() for a, b in zip(first, again, strict=True))
    assert (first[0].pixels != first[1].pixels).any()


def test_rewards_to_advantages_to_token_weights(model: Any, work: Path) -> None:
    """A named reward per picture, its advantage over the group, one weight for all tokens of a sample."""
    from PIL import Image

    reward = judge_of(JudgeOptions(by="exact"), None)
    group = list(read_records(work / "drawn.jsonl", "image_file"))
    rewards = np.array([
        reward(Image.open(work / "images" / one["image_file"]).convert("RGB"), one, []).overall for one in group
    ])  # fmt: skip
    advantages = (rewards - rewards.mean()) / rewards.std()
    assert advantages.min() < 0 < advantages.max()
    samples = [
        lay_out([Text(0, 3), Latent(1, 2, 2 + n, noised=True)], SampleKey(0, "group", n, 0), ())
        for n in range(len(group))
    ]
    pack, config = build_pack(samples), model.config
    flow_L = np.concatenate([np.full(2 * (2 + n), advantage, np.float32) for n, advantage in enumerate(advantages)])
    words = np.zeros(int((pack.kind_S == 0).sum()), np.int64)
    rank = RankPack.of(pack, config, RankPlace())
    rows = derive_rows(rank, config, words, LatentWeights(flow_L))
    latents = rows.latents
    assert latents is not None
    real_g = rows.latent_g >= 0
    assert (
        np.array_equal(latents.weight_g[real_g], flow_L[rows.latent_g[real_g]]) and not latents.weight_g[~real_g].any()
    )


def test_a_second_velocity_pulls_with_its_own_weight() -> None:
    """Gradient of advantage * |v - target|^2 + beta * |v - v_ref|^2, as the velocity penalty of UniGRPO."""
    draw = torch.Generator().manual_seed(0)
    velocity, target, frozen = (torch.randn(5, 8, generator=draw) for _ in range(3))
    advantage, beta = torch.tensor([1.5, -0.5, 0.0, 1.0, -2.0]), torch.full((5,), 0.3)
    velocity.requires_grad_()
    TORCH.flow_loss(velocity, target, advantage, Constraint(frozen, beta)).sum().backward()
    expected = 2 / 8 * (advantage[:, None] * (velocity - target) + beta[:, None] * (velocity - frozen))
    torch.testing.assert_close(velocity.grad, expected.detach())


def test_a_given_timestep_is_a_given_draw() -> None:
    shift, wanted = 3.0, torch.tensor([0.05, 0.5, 0.93])
    s = wanted / (shift - (shift - 1) * wanted)
    torch.testing.assert_close(timestep(torch.log(s / (1 - s)), shift), wanted)


def test_given_noised_latents_reach_their_rows(shapes: Path) -> None:
    import megabagel
    from megabagel.parallel.attention import choose_attention
    from megabagel.parallel.inputs import GivenLatents, InputBuilder
    from megabagel.parallel.mesh import single_mesh
    from tests.support.small_run import small_config

    config = small_config(shapes)
    batch = next(megabagel.batches(config))
    rows = batch.rows.arrays()
    count = int((batch.pack.kind_S == LATENT).sum())
    x_t_LZ = torch.randn(count, config.model.latent_dim, generator=torch.Generator().manual_seed(0))
    builder = InputBuilder(config, single_mesh(), None, torch.device("cpu"), attention=choose_attention(config))
    latents = builder.build(batch, GivenLatents(x_t_LZ, 0.25)).latents
    assert latents is not None and count > 8
    real_g = torch.from_numpy(rows.latent_g >= 0)
    assert torch.equal(latents.x_t_gZ[real_g], x_t_LZ[torch.from_numpy(rows.latent_g)[real_g]])
    assert not latents.x_t_gZ[~real_g].any() and set(latents.time_I.tolist()) == {0.25}

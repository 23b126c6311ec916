"""Sample images: the sampler follows the field that it is given, and draws the same pictures on every grid."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabagel.config.schema import Config, TelemetryConfig
from megabagel.errors import UserError
from tests.support.config_tree import change
from tests.support.rank_pool import RankPool
from tests.support.small_run import small_config

Pictures = dict[str, np.ndarray]

PROMPTS = (
    "a red circle on the left",
    "a blue square in the middle",
    "a green triangle on the right",
    "a yellow circle on the right",
    "a purple square on the left, there is a red triangle in the middle",
    "circle",
    "a blue triangle",
    "red",
    "a yellow triangle on the left",
    "a purple circle in the middle",
)
FEW = (PROMPTS[4], PROMPTS[1])
LEVELS = 2
"""Of 255: what rounding may do to a picture."""


def config_of(shapes: Path, **grid: int | bool) -> Config:
    """The small run with four layers and large weights, so that a few steps and the words of a prompt show."""
    return change(
        small_config(shapes),
        {
            "model.layers": 4,
            "model.init_std": 0.3,
            "train.warmup": 1,
            "train.timestep_shift": 2.0,
            **{f"parallel.{axis}": size for axis, size in grid.items()},
            "telemetry.sample_every": 1,
            "telemetry.prompts": PROMPTS,
        },
    )


def variants(base: TelemetryConfig) -> dict[str, TelemetryConfig]:
    """What is drawn by every grid."""
    return {
        "plain": base,
        "guided": replace(base, sample_guidance=8.0),
        "few": replace(base, prompts=FEW),
        "few guided": replace(base, prompts=FEW, sample_guidance=8.0),
    }


def build(config: Config) -> tuple[Any, Callable[..., Any]]:
    """A trainer on this rank, and a function that makes a sampler of it for other telemetry settings."""
    from megabagel.data.tokenize.tokenizer import load_tokenizer
    from megabagel.generate.euler import EulerSampler
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend
    from megabagel.train.build import build_trainer

    cpu_backend.install()
    trainer = build_trainer(config, mesh.build(config))
    tokenizer = load_tokenizer(config.data.tokenizer)

    def sampler(telemetry: TelemetryConfig, evaluate: Any = None, **changes: Any) -> EulerSampler:
        settings = change(replace(config, telemetry=telemetry), changes)
        batches = replace(trainer.loader.filler.batches, config=settings)
        evaluate = evaluate or trainer.runner.evaluate
        return EulerSampler(settings, trainer.mesh, batches, trainer.builder, tokenizer, evaluate)

    return trainer, sampler


def draw(config: Config) -> tuple[dict[str, Pictures], list[int]]:
    """Train a little, then draw everything; and how many packs the guided prompts took."""
    trainer, sampler = build(config)
    before = trainer.sampler.draw()
    for step in trainer.loader.steps(6):
        trainer.train_step(step)
    kinds = {name: sampler(telemetry) for name, telemetry in variants(config.telemetry).items()}
    pictures = {name: made.draw() for name, made in kinds.items()}
    return {"untrained": before, **pictures}, [len(c.prompts) for c in kinds["guided"].canvases]


@pytest.fixture(scope="module")
def alone(ranks: RankPool, shapes: Path) -> dict[str, Pictures]:
    """Pictures of one rank."""
    ((pictures, prompts_per_pack),) = ranks.run(1, draw, config_of(shapes))
    assert len(prompts_per_pack) == 3 and sum(prompts_per_pack) == len(PROMPTS)
    return pictures


def distance(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - two.astype(int)).max())


def test_pictures_are_worth_comparing(alone: dict[str, Pictures]) -> None:
    """Training, prompt, guidance: each moves every picture by far more than rounding does."""
    for name, pictures in alone.items():
        assert tuple(pictures) == (FEW if "few" in name else PROMPTS)
        for picture in pictures.values():
            assert picture.shape == (32, 48, 3) and picture.dtype == np.uint8
            assert np.ptp(picture) > 50
    for prompt in PROMPTS:
        assert distance(alone["plain"][prompt], alone["untrained"][prompt]) > 8 * LEVELS
        assert distance(alone["plain"][prompt], alone["guided"][prompt]) > 8 * LEVELS
    plain = list(alone["plain"].values())
    assert all(distance(a, b) > 8 * LEVELS for a, b in pairwise(plain))


def test_other_prompts_do_not_change_a_picture(alone: dict[str, Pictures]) -> None:
    for prompt in FEW:
        assert distance(alone["few"][prompt], alone["plain"][prompt]) <= LEVELS
        assert distance(alone["few guided"][prompt], alone["guided"][prompt]) <= LEVELS


@pytest.mark.parametrize(
    "grid",
    [{"tp": 2}, {"tp": 2, "sp": False}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}, {}],
    ids=["tp2", "tp2 without sp", "pp2", "pp2 vpp2", "cp2", "dp2"],
)
def test_every_grid_draws_the_same_pictures(
    ranks: RankPool, shapes: Path, alone: dict[str, Pictures], grid: dict[str, int]
) -> None:
    results = ranks.run(2, draw, config_of(shapes, **grid))
    (mine, _), (theirs, _) = results
    for name, pictures in alone.items():
        for prompt, picture in pictures.items():
            assert np.array_equal(mine[name][prompt], theirs[name][prompt]), "ranks drew different pictures"
            assert distance(mine[name][prompt], picture) <= LEVELS, (name, prompt)


def follow(config: Config, guidance: float, steps: int, skew: float) -> tuple[Pictures, Pictures]:
    """Draw in a field that leads straight to known pictures, and those pictures.

    With text the velocity of picture i is (x - x_0[i]) / t, which any number of Euler steps follows exactly. Without
    text there is `skew` on top, which guidance turns into -(g - 1) skew all the way from t = 1 to 0.
    """
    import torch

    from megabagel.model.inputs import Outputs, StageInputs
    from megabagel.sequence.patches import patchify, unpatchify

    trainer, sampler = build(config)
    telemetry = replace(config.telemetry, sample_guidance=guidance, sample_steps=steps)
    goals = [torch.from_numpy(np.random.default_rng(i).uniform(-2, 2, (6, 64))).float() for i in range(len(PROMPTS))]
    turn = 0

    def evaluate(inputs: StageInputs) -> Outputs:
        """Called for every canvas step by step; which prompts it holds follows from how often it was called."""
        nonlocal turn
        canvas = made.canvases[turn // steps]
        first = sum(len(c.prompts) for c in made.canvases[: turn // steps])
        turn += 1
        latents = inputs.latents
        assert latents is not None and inputs.vit is not None
        time, count = float(latents.time_I[0]), len(canvas.prompts)
        token_g = (latents.grid_g // config.model.latent_grid) * 3 + latents.grid_g % config.model.latent_grid
        goal_gZ = torch.stack(goals)[first + latents.image_g % count, token_g]
        unguided_g = (latents.image_g >= count).float()
        velocity_gZ = (latents.x_t_gZ - goal_gZ) / time + skew * unguided_g[:, None]
        none = torch.zeros(0)
        return Outputs(none, none, velocity_gZ)

    made = sampler(telemetry, evaluate)
    found = made.draw()
    codec = trainer.builder.codec
    expected = {}
    for prompt, goal in zip(PROMPTS, goals, strict=True):
        x_LZ = goal + _drift(steps, (1 - guidance) * skew if guidance > 1 else 0.0)
        assert torch.equal(patchify(unpatchify(x_LZ, 2, 3, 2), 2), x_LZ)
        pixels = codec.decode(unpatchify(x_LZ, 2, 3, 2)[None])[0]
        expected[prompt] = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return found, expected


def _drift(steps: int, skew: float) -> float:
    """How far Euler steps end from the goal when `skew` is added to v = (x - goal) / t; t is s shifted by 2."""
    error = 0.0
    for now, then in pairwise(2 * s / (1 + s) for s in np.linspace(1, 0, steps + 1)):
        error -= (error / now + skew) * (now - then)
    return float(error)


@pytest.mark.parametrize(
    ("guidance", "steps", "skew", "grid"),
    [
        (1.0, 1, 0.0, {}),
        (1.0, 4, 0.5, {}),
        (3.0, 4, 0.5, {}),
        (3.0, 4, 0.5, {"tp": 2}),
        (3.0, 4, 0.5, {"cp": 2}),
        (0.0, 2, 0.5, {}),
    ],
)
def test_the_sampler_follows_the_field(
    ranks: RankPool, shapes: Path, guidance: float, steps: int, skew: float, grid: dict[str, int]
) -> None:
    size = max(grid.values(), default=1)
    for found, expected in ranks.run(size, follow, config_of(shapes, **grid), guidance, steps, skew):
        assert tuple(found) == PROMPTS
        for prompt, picture in expected.items():
            assert distance(found[prompt], picture) <= 1
            assert np.ptp(picture) > 50


def refuse(config: Config) -> str:
    _, sampler = build(replace(config, telemetry=replace(config.telemetry, sample_every=0)))
    with pytest.raises(UserError) as caught:
        sampler(replace(config.telemetry, prompts=("red", "a long story " * 20)))
    return str(caught.value)


def test_a_prompt_that_fits_into_no_pack_is_named(ranks: RankPool, shapes: Path) -> None:
    (message,) = ranks.run(1, refuse, config_of(shapes))
    assert "telemetry.prompts: 'a long story" in message and "data.max_tokens is 128: shorten it" in message

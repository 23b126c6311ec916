"""Samples of a training run: those of its averaged weights in the inference engine, on every grid, leaving no trace."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megabagel.config.schema import Config, SampleRequest
from megabagel.errors import UserError
from tests.support.config_tree import change
from tests.support.rank_pool import RankPool
from tests.support.small_run import small_config

Pictures = dict[str, np.ndarray]

PROMPTS = ("a red circle on the left", "a blue square in the middle", "red", "a green triangle on the right")
INSTRUCTION, QUESTION = "make the circle blue", "what is in the picture?"
LEVELS = 2
"""Of 255: the most that rounding of another grid changes a picture."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file to edit and to ask about, 60 x 48 pixels."""
    path = tmp_path_factory.mktemp("pages") / "page.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (48, 60, 3), np.uint8)).save(path)
    return path


def config_of(shapes: Path, page: Path, folder: Path, **changes: Any) -> Config:
    """The small run with four layers and large weights, so that a few steps and the text of a prompt show."""
    return change(
        small_config(shapes, folder),
        {
            "model.layers": 4,
            "model.init_std": 0.3,
            "train.warmup": 1,
            "train.lr": 0.02,
            "train.ema": 0.7,
            "train.timestep_shift": 2.0,
            "telemetry.sample_every": 1,
            "telemetry.sample_steps": 5,
            "telemetry.sample_guidance": 4.0,
            "telemetry.prompts": PROMPTS,
            "telemetry.edits": (SampleRequest(str(page), INSTRUCTION),),
            "telemetry.questions": (SampleRequest(str(page), QUESTION),),
            **changes,
        },
    )


def trained(config: Config, steps: int = 4) -> Any:
    """A trainer after some steps."""
    from megabagel.inference.training_samples import training_sampler
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend
    from megabagel.train.build import build_trainer

    cpu_backend.install()
    trainer = build_trainer(config, mesh.build(config), samplers=training_sampler)
    for step in trainer.loader.steps(steps):
        trainer.train_step(step)
    return trainer


def draw(config: Config) -> Pictures:
    return dict(trained(config).sample())


@pytest.fixture(scope="module")
def alone(ranks: RankPool, shapes: Path, page: Path, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Samples of one rank."""
    (pictures,) = ranks.run(1, draw, config_of(shapes, page, tmp_path_factory.mktemp("run")))
    return dict(pictures)


def distance(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - two.astype(int)).max())


def test_samples_are_worth_comparing(alone: Pictures) -> None:
    *drawn, edited, asked = alone
    assert tuple(drawn) == PROMPTS and edited == f"{INSTRUCTION} (page.png)"
    assert asked.startswith(f"{QUESTION} (page.png) -> ")
    for prompt in PROMPTS:
        assert alone[prompt].shape == (32, 48, 3) and alone[prompt].dtype == np.uint8 and np.ptp(alone[prompt]) > 50
    assert alone[edited].shape[:2] == (48, 64), "an edit has the size of its image, in whole latent tokens"
    assert all(distance(alone[a], alone[b]) > 8 * LEVELS for a, b in pairwise(PROMPTS))


@pytest.mark.parametrize(
    "grid",
    [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}, {}],
    ids=["tp2", "pp2", "pp2 vpp2", "cp2", "dp2"],
)
def test_every_grid_makes_the_same_samples(
    ranks: RankPool, shapes: Path, page: Path, tmp_path: Path, alone: Pictures, grid: dict[str, int]
) -> None:
    config = config_of(shapes, page, tmp_path, **{f"parallel.{axis}": size for axis, size in grid.items()})
    mine, others = ranks.run(2, draw, config)
    assert others == {} and list(mine) == list(alone)
    for caption, picture in alone.items():
        assert distance(mine[caption], picture) <= LEVELS, caption


def saved_and_loaded(config: Config) -> tuple[Pictures, Pictures, Pictures]:
    """Samples in training, then of the checkpoint through the loaded model: averaged and trained weights."""
    import megabagel
    from megabagel.sequence.keys import seed64

    trainer = trained(config)
    during = trainer.sample()
    trainer.save(trainer.plan.state())
    trainer.saver.close()
    page = Path(config.telemetry.edits[0].image)
    options = {"points": 6, "shift": 2.0, "text_scale": 4.0, "image_scale": 1.0, "interval": (0.0, 1.0)}

    def of(weights: str) -> Pictures:
        model = megabagel.load_pretrained(trainer.newest, weights)

        def seed(text: str) -> int:
            return seed64(config.train.seed, "sample image", text) >> 1

        found = {
            prompt: model.generate(prompt, size=(48, 32), seed=seed(prompt), renorm_min=1.0, **options)[0].pixels
            for prompt in PROMPTS
        }
        edited = model.edit([page], INSTRUCTION, seed=seed(INSTRUCTION), preset="notebook", renorm_min=1.0, **options)
        answer = model.ask([page], QUESTION, max_new_tokens=48)
        return found | {f"{INSTRUCTION} (page.png)": edited[0].pixels, f"{QUESTION} (page.png) -> {answer}": page}

    return during, of("ema"), of("trained")


def test_samples_are_those_of_the_averaged_checkpoint(
    ranks: RankPool, shapes: Path, page: Path, tmp_path: Path
) -> None:
    ((during, averaged, plain),) = ranks.run(1, saved_and_loaded, config_of(shapes, page, tmp_path))
    assert list(during) == list(averaged)
    for caption in list(during)[:-1]:
        assert np.array_equal(during[caption], averaged[caption]), caption
    assert all(distance(averaged[prompt], plain[prompt]) > LEVELS for prompt in PROMPTS)


def before_and_after(config: Config) -> list[str]:
    """Names of weights, averages and moments, of this rank, whose bits sampling changed."""
    import torch

    trainer = trained(config, 2)
    kept = {key: tensor.data.clone() for key, tensor in trainer.tensors().items()}
    weights = [p.detach().clone() for chunk in trainer.optimizer.chunks for p in chunk.parameters()]
    trainer.sample()
    changed = [key for key, tensor in trainer.tensors().items() if not torch.equal(kept[key], tensor.data)]
    now = [p.detach() for chunk in trainer.optimizer.chunks for p in chunk.parameters()]
    assert len(kept) > 10 and len(weights) > 10
    return changed + [f"weight {i}" for i, pair in enumerate(zip(weights, now, strict=True)) if not torch.equal(*pair)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampling_changes_no_bit_of_the_run(
    ranks: RankPool, shapes: Path, page: Path, tmp_path: Path, precision: str
) -> None:
    config = config_of(shapes, page, tmp_path, **{"train.precision": precision, "telemetry.sample_steps": 1})
    assert ranks.run(2, before_and_after, config) == [[], []]


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        trained(config, 0)
    return str(caught.value)


@pytest.mark.parametrize("key", ["edits", "questions"])
def test_an_image_that_cannot_be_read_is_named(
    ranks: RankPool, shapes: Path, page: Path, tmp_path: Path, key: str
) -> None:
    missing = (SampleRequest(str(tmp_path / "none.png"), "a text"),)
    (message,) = ranks.run(1, refusal, config_of(shapes, page, tmp_path, **{f"telemetry.{key}": missing}))
    assert message.startswith(f"telemetry.{key}: {tmp_path / 'none.png'}: cannot be read")

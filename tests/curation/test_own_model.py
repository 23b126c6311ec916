"""Answers of a checkpoint of ours: one model in this process, questions as one batch, cached as any other."""

from pathlib import Path

import pytest

from megabagel.curation.models.seam import Question, open_models, usage
from megabagel.curation.recipe import MODELS
from tests.support.config_tree import change
from tests.support.pictures import file_of, noise
from tests.support.rank_pool import RankPool
from tests.support.small_run import small_config
from tests.train.test_resume import train


def ask(checkpoint: Path, folder: Path) -> list[str]:
    models = open_models({"chat": {**MODELS, "kind": "checkpoint", "checkpoint": str(checkpoint)}}, folder)
    assert models is not None and models.chat.name.startswith("checkpoint ")
    image = file_of(noise(32, 32))
    return models.ask([Question("caption", (image,), 4), Question("topic", ("a, b", "a page"), 3)])


@pytest.mark.thorough
def test_a_checkpoint_answers(ranks: RankPool, shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks.run(1, train, change(small_config(shapes, run), {"train.steps": 1, "checkpoint.every": 1}))
    first = ranks.run(1, ask, run, tmp_path / "answers")
    assert ranks.run(1, ask, run, tmp_path / "answers") == first
    assert usage(tmp_path / "answers")["caption"]["answers"] == 1

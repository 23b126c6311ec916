"""A small trained model for the tests of this room."""

from pathlib import Path

import pytest

from megabagel.config.schema import SourceConfig
from tests.support.config_tree import change
from tests.support.rank_pool import RankPool
from tests.support.small_run import small_config
from tests.train.test_resume import train


@pytest.fixture(scope="session")
def trained(ranks: RankPool, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint after each; it has learned nothing, but every path of inference works."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    held = {"data.val_sources": (SourceConfig("draw", "scenes-*.tar", "t2i"),), "train.val_packs": 2}
    ranks.run(1, train, change(small_config(shapes, folder), {"train.steps": 2, "checkpoint.every": 1, **held}))
    return folder

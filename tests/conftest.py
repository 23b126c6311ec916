"""Fixtures for all rooms."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks.run(world_size, function, *args)` runs a top-level function on ranks (tests/support/rank_pool.py)."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the small shape data set (tests/support/small_run.py), which nobody may change."""
    from tests.support.small_run import write_data

    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_data(folder)
    return folder

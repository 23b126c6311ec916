"""Fixtures for all rooms."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.parity_files import at_hand, cases_of
from tests.support.rank_pool import RankPool


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of golden cases that are absent; tests/parity/test_golden_cases.py names their folder."""
    absent = [item for item in items if len(at_hand(*(needed := tuple(cases_of(item))))) < len(needed)]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in set(absent)]


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

"""Fixtures for all rooms."""

from collections.abc import Iterator

import pytest

from tests.parallel.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks.run(world_size, function, *args)` runs a top-level function on ranks (tests/parallel/pool.py)."""
    pool = RankPool()
    yield pool
    pool.close()

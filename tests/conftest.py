"""Fixtures for all rooms."""

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.parity_files import at_hand, cases_of
from tests.support.rank_pool import RankPool

# No deadline per example: on a busy machine an example of a millisecond may take half a second.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # runs that tests start heed it, also where nohup started the tests

COSTLY = (
    "tests/faults",
    "tests/kernels",
    "tests/parity",
    "tests/runtime/test_launch.py",
    "tests/slurm",
    "tests/test_bad_input.py",
    "tests/test_documents_python.py",
    "tests/test_readme.py",
    "tests/tools",
)
"""Tests that start jobs, run kernels in Triton's interpreter, or build corpora; `make check` leaves them out."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out, and leave out tests of golden cases that are absent.

    tests/parity/test_golden_cases.py names the folder of the absent cases.
    """
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("ranks")
        if item.nodeid.startswith(COSTLY) or "served" in getattr(item, "fixturenames", ()):
            item.add_marker("costly")
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

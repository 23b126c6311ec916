"""Which links a group of ranks has, and what its collectives take."""

import pytest

from megabagel.planner.calibration import Calibration
from megabagel.planner.communication import bandwidth, collective, wire
from megabagel.planner.estimate import Planner
from megabagel.planner.hardware import CATALOG
from tests.planner.test_planner import grid, recipe


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(recipe(), CATALOG["h200"])


def test_collectives(planner: Planner) -> None:
    """A ring of 8 on NVLink, and across servers a share of the network ports."""
    case, free = planner.case(grid(4, 1, 1, 16)), Calibration(latency=0.0, link=1.0)
    assert collective(case, free, 8, 1, 8e9) == pytest.approx(7e9 / 450e9)
    assert collective(case, free, 64, 4, 64e9) == pytest.approx(63e9 / (2 * 50e9))
    assert collective(case, free, 1, 1, 1e9) == 0


@pytest.mark.parametrize(
    ("size", "stride", "link"),
    [
        (2, 4, 450),  # 0 4, 1 5, ...
        (4, 2, 450),
        (3, 2, 50),  # 0 2 4 lies in one server of 8, but 6 8 10 has one rank in the first
        (6, 1, 100),  # 6 7 | 8 ... 11
        (3, 1, 50),  # 6 7 | 8
        (12, 1, 200),  # 0 ... 7 | 8 ... 11
        (2, 3, 50),  # 6 | 9
        (2, 8, 50),
    ],
)
def test_a_link_is_that_of_the_group_that_lies_worst(planner: Planner, size: int, stride: int, link: float) -> None:
    case = planner.case(grid(4, 1, 1, 12))
    assert bandwidth(case, Calibration(link=1.0), size, stride) == link * 1e9


def test_a_job_within_one_server_has_its_links_alone(planner: Planner) -> None:
    assert bandwidth(planner.case(grid(1, 1, 2, 3)), Calibration(link=1.0), 3, 2) == 450e9


def test_stages_in_different_servers_send_over_the_network(planner: Planner) -> None:
    """Of 16 GPUs in four stages the second ends one server and the third begins the next."""
    free = Calibration(latency=0.0, link=1.0)
    within, across = (planner.case(grid(1, 4, 1, dp)) for dp in (2, 4))
    assert wire(across, free) == pytest.approx(9 * wire(within, free))

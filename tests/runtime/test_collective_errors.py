"""A user's mistake on one rank is told to all of them."""

import pytest

from megabagel.errors import UserError
from tests.support.rank_pool import RankPool


def outcomes(mistakes: list[str | None]) -> tuple[str, str]:
    """What `everywhere` and `once` come to on this rank when each rank makes its own mistake, or none."""
    import torch.distributed as dist

    from megabagel.config.schema import Config
    from megabagel.parallel.mesh import build
    from megabagel.runtime.collective_errors import everywhere, once

    mesh = build(Config())
    rank = dist.get_rank()

    def act() -> str:
        if mistakes[rank]:
            raise UserError(mistakes[rank])
        return f"done by {rank}"

    def message(tell: object) -> str:
        try:
            return str(tell(mesh, act))  # type: ignore[operator]
        except UserError as error:
            return f"error: {error}"

    return message(everywhere), message(once)


@pytest.mark.parametrize(
    ("mistakes", "expected"),
    [
        ([None, None], [("done by 0", "None"), ("done by 1", "None")]),
        ([None, "b"], [("error: rank 1: b", "None")] * 2),
        (["a", None], [("error: rank 0: a", "error: a")] * 2),
        (["a", "a"], [("error: a", "error: a")] * 2),
        (["a", "b"], [("error: rank 0: a", "error: a")] * 2),
        (["a"], [("error: a", "error: a")]),
    ],
)
def test_mistakes_are_told_to_all(ranks: RankPool, mistakes: list[str | None], expected: list[tuple[str, str]]) -> None:
    assert ranks.run(len(mistakes), outcomes, mistakes) == expected

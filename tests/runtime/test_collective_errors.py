"""Error propagation: an error on one rank is raised on all of them; and values of all ranks, combined."""

import errno
import re
from collections.abc import Callable

import pytest

from megabagel.errors import TransientFailure, UserError
from tests.support.rank_pool import RankPool


def outcomes(mistakes: list[str | None]) -> tuple[str, str]:
    """What `on_all_ranks` and `on_rank0` come to on this rank when each rank makes its own mistake, or none."""
    import torch.distributed as dist

    from megabagel.runtime.collective_errors import on_all_ranks, on_rank0

    rank = dist.get_rank()

    def act() -> str:
        if mistakes[rank] == "full":
            raise UserError("full") from OSError(errno.ENOSPC, "no space")
        if mistakes[rank]:
            raise UserError(mistakes[rank])
        return f"done by {rank}"

    def message(run: Callable[[Callable[[], str]], str | None]) -> str:
        try:
            return str(run(act))
        except UserError as error:
            return f"{'transient' if error.code == TransientFailure.code else 'error'}: {error}"

    return message(on_all_ranks), message(on_rank0)


def compared(facts: list[dict[str, str]]) -> str:
    import torch.distributed as dist

    from megabagel.runtime.collective_errors import all_union, require_equal

    rank = dist.get_rank()
    assert all_union(frozenset({f"a{rank % 2}", "b"})) == {f"a{n % 2}" for n in range(dist.get_world_size())} | {"b"}
    try:
        require_equal(facts[rank])
    except UserError as error:
        return str(error)
    return ""


def test_facts_that_differ_are_named_on_every_rank(ranks: RankPool) -> None:
    facts = {"tokenizer": "t", "contents of data.sources a": "1"}
    assert ranks.run(2, compared, [facts, dict(facts)]) == ["", ""]
    one, other = ranks.run(2, compared, [facts, facts | {"contents of data.sources a": "2"}])
    assert one == other and re.match(
        r"contents of data.sources a = 2 on rank 1 \(.*, process \d+\), but 1 on rank 0 \(", one
    )


@pytest.mark.parametrize(
    ("mistakes", "expected"),
    [
        ([None, None], [("done by 0", "None"), ("done by 1", "None")]),
        ([None, "b"], [("error: rank 1: b", "None")] * 2),
        (["a", None], [("error: rank 0: a", "error: a")] * 2),
        (["a", "a"], [("error: a", "error: a")] * 2),
        (["a", "b"], [("error: rank 0: a", "error: a")] * 2),
        (["a"], [("error: a", "error: a")]),
        ([None, "full"], [("transient: rank 1: full", "None")] * 2),  # the exit code of every rank depends on it
        (["full", "a"], [("transient: rank 0: full", "transient: full")] * 2),
    ],
)
def test_an_error_is_raised_on_all_ranks(
    ranks: RankPool, mistakes: list[str | None], expected: list[tuple[str, str]]
) -> None:
    assert ranks.run(len(mistakes), outcomes, mistakes) == expected


def combined() -> tuple[list[int], frozenset[str]]:
    import torch.distributed as dist

    from megabagel.runtime.collective_errors import all_max, all_union

    rank = dist.get_rank()
    return all_max(rank, -rank, 7), all_union(frozenset({"all", f"rank {rank}"}))


def test_values_of_all_ranks(ranks: RankPool) -> None:
    assert ranks.run(3, combined) == [([2, 0, 7], frozenset({"all", "rank 0", "rank 1", "rank 2"}))] * 3


def handed_out(full: bool) -> object:
    """The value that rank 0 makes, or the message of its error; other ranks must not make one."""
    import torch.distributed as dist

    from megabagel.runtime.collective_errors import from_rank0

    def make() -> list[object]:
        assert dist.get_rank() == 0
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", "drawn.jsonl")
        return ["a", {"b": 1}, None]

    try:
        return from_rank0(make)
    except UserError as error:
        return str(error)


def test_rank_0_hands_out_its_value_or_its_error(ranks: RankPool) -> None:
    """A failing disk as well: the others would otherwise wait for a value that never comes."""
    assert ranks.run(2, handed_out, False) == [["a", {"b": 1}, None]] * 2
    first, second = ranks.run(2, handed_out, True)
    assert first == second and "drawn.jsonl" in first

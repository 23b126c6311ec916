"""Three stages over one folder: equal files after kills, on shards and on ranks; other evaluations are refused."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megabagel.errors import UserError
from megabagel.evaluation.suites.registry import suite_of
from megabagel.journal import Journal, read_journal
from megabagel.locks import inside, locked
from tests.support.rank_pool import RankPool

LIMIT = 9
"""Items: three of each ability."""


def work(limit: int = LIMIT, shard: tuple[int, int] = (0, 1)) -> Any:
    """A short evaluation with the suite `shapes`."""
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.evaluation.generate import Settings
    from megabagel.evaluation.session import Work

    suite = replace(suite_of("shapes"), max_new_tokens=4)
    settings = Settings.of(suite, steps=3, size=(32, 32))
    return Work(suite, suite.read(None), limit, settings, shard=shard)


def evaluate(checkpoint: Path, out: Path, limit: int = LIMIT) -> dict[str, Any]:
    from megabagel.evaluation import session

    session.generate_stage(work(limit), [(checkpoint, out)])
    session.judge_stage(work(limit), [out], None, {}, 1)
    (summary,) = session.summarise_stage(work(limit), [out], "published")
    return summary


def made(out: Path) -> dict[str, bytes]:
    """Pictures and the table."""
    pictures = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")}
    return {**pictures, "table": (out / "table.md").read_bytes()}


def answers(out: Path) -> dict[str, str]:
    return {r["id"]: r["text"] for path in out.glob("generated.*") for r in read_journal(path) if "text" in r}


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation without interruption."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(trained, out)
    return out


def test_summary(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["scored"] == summary["outputs"] == LIMIT
    assert summary["judge"] == {"judge": "exact", "templates": mock.ANY, "errors": {"truths": 1.0, "wrong": 0.0}}
    assert {"draw", "edit", "ask", "edit: kept"} <= summary["scores"].keys()
    assert summary["scores"]["ask"]["count"] == 3 and summary["model"]["weights"] == "ema"
    assert len(made(whole)) == 7 and len(answers(whole)) == 3
    assert "| draw |" in (whole / "table.md").read_text()


class Killed(BaseException):
    """The process is gone."""


def test_a_kill_at_any_item_changes_nothing(trained: Path, whole: Path, tmp_path: Path) -> None:
    append, chance = Journal.append, random.Random(7)

    def mortal(journal: Journal, record: Any) -> None:
        fate = chance.random()
        if fate < 0.3:
            raise Killed
        append(journal, record)
        if fate < 0.4:  # in the middle of the next record
            with journal.path.open("ab") as file:
                file.write(b'{"id": "draw-0000')
            raise Killed

    kills = 0
    with mock.patch.object(Journal, "append", mortal):
        while True:
            try:
                evaluate(trained, tmp_path)
                break
            except Killed:
                kills += 1
    assert kills >= 5
    assert made(tmp_path) == made(whole) and answers(tmp_path) == answers(whole)


def test_a_longer_limit_goes_on_and_a_lost_picture_is_made_again(trained: Path, whole: Path, tmp_path: Path) -> None:
    evaluate(trained, tmp_path, 3)
    (tmp_path / "outputs" / "draw" / "draw-00000.png").unlink()
    evaluate(trained, tmp_path)
    assert made(tmp_path) == made(whole)


def test_shards_share_a_folder(trained: Path, whole: Path, tmp_path: Path) -> None:
    from megabagel.evaluation import session

    for number in (1, 0):
        session.generate_stage(work(shard=(number, 2)), [(trained, tmp_path)])
    assert [len(read_journal(tmp_path / f"generated.{n}-of-2.jsonl")) for n in (0, 1)] == [5, 4]
    evaluate(trained, tmp_path)
    assert made(tmp_path) == made(whole) and answers(tmp_path) == answers(whole)


def on_rank(checkpoint: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """The stage `generate` on a rank of the pool."""
    import torch.distributed as dist

    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.evaluation import session

    @contextmanager
    def here(config: Any) -> Iterator[mesh.Mesh]:
        yield mesh.build(config)

    place = (dist.get_rank(), dist.get_world_size(), dist.get_rank())
    patches = (
        mock.patch.object(session, "distributed", here),
        mock.patch.object(session, "read_launch_env", lambda: place),
    )
    with patches[0], patches[1]:
        session.generate_stage(replace(work(), overrides=overrides), [(checkpoint, out)])


@pytest.mark.parametrize("overrides", [(), ("parallel.pp=2",)])
def test_ranks_make_the_same_pictures(
    ranks: RankPool, trained: Path, whole: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    ranks.run(2, on_rank, trained, tmp_path, overrides)
    evaluate(trained, tmp_path)
    assert made(tmp_path) == made(whole) and answers(tmp_path) == answers(whole)


def test_refusals(trained: Path, whole: Path, tmp_path: Path) -> None:
    from megabagel.evaluation import session

    with pytest.raises(UserError, match=r"model\.name is 'step_00000002' there and 'step_00000001' here"):
        session.generate_stage(work(), [(trained / "checkpoints" / "step_00000001", whole)])
    with pytest.raises(UserError, match=r"holds no evaluation"):
        session.judge_stage(work(), [tmp_path], None, {}, 1)
    with (
        mock.patch("megabagel.locks.PATIENCE_S", 0.1),
        locked(inside(whole), "other"),
        pytest.raises(UserError, match="in use by"),
    ):
        session.judge_stage(work(), [whole], None, {}, 1)
    picture = whole / "outputs" / "draw" / "draw-00000.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:-40])
    with pytest.raises(UserError, match="no whole picture"):
        session.judge_stage(work(), [whole], None, {}, 1)
    picture.write_bytes(content)


def test_a_checker_that_errs_may_not_judge(trained: Path, whole: Path) -> None:
    from megabagel.evaluation import session, shapes_suite
    from megabagel.evaluation.suites import shapes

    shapes.gate.cache_clear()
    with (
        mock.patch.object(shapes_suite, "self_test", lambda *_: {"truths": 1.0, "wrong": 0.05}),
        pytest.raises(UserError, match=r"5.0% of wrong outputs"),
    ):
        session.judge_stage(work(), [whole], None, {}, 1)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"id": 1}\nnonsense\n{"id"')
    with pytest.raises(UserError, match=r"x\.jsonl, line 2"):
        read_journal(tmp_path / "x.jsonl")

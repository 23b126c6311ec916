"""Evaluation of one or several checkpoints with a suite: model, ranks, folder locks, and the stages in order."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.evaluation.generate import Settings, generate
from megabagel.evaluation.judges.judge import Judge
from megabagel.evaluation.run import IDENTITY, claim, items_digest, judge_outputs, summarise
from megabagel.evaluation.suite import Item, Rule, Suite
from megabagel.inference.api import Pipeline
from megabagel.inference.load import Source, open_source
from megabagel.journal import Record
from megabagel.locks import inside, locked
from megabagel.log import configure_log
from megabagel.parallel.mesh import Mesh, distributed
from megabagel.runtime.collective_errors import on_all_ranks, on_rank0
from megabagel.runtime.launch_env import read_launch_env

STAGES = ("generate", "judge", "summarise")


@dataclass(frozen=True)
class Work:
    """One evaluation: suite, items and settings."""

    suite: Suite
    items: Sequence[Item]
    """All items of the suite."""
    limit: int | None
    settings: Settings
    weights: str | None = None
    overrides: tuple[str, ...] = ()
    cache_tokens: int = 32768
    shard: tuple[int, int] = (0, 1)
    """(number, count) of this job among those of a job array, which share the folder."""

    @property
    def chosen(self) -> Sequence[Item]:
        """The first `limit` items."""
        return self.items[: self.limit]


Place = tuple[Path, Path]
"""(checkpoint, folder of its evaluation)."""


@contextmanager
def folder_lock(out: Path, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Hold the lock of an evaluation's folder: alone, or beside the other shards of one job array."""
    what, alone = f"--out {out}", inside(out)
    with ExitStack() as held:
        if shard[1] == 1:
            held.enter_context(locked(alone, what))
            for other in sorted(out.glob(".lock-*-of-*")):
                held.enter_context(locked(other, what))
        else:
            held.enter_context(locked(out / f".lock-{shard[0]}-of-{shard[1]}", what))
            with locked(alone, what):
                pass
        yield


def generate_stage(work: Work, places: Sequence[Place]) -> None:
    """Make the outputs of checkpoints, on all ranks of the job: each replica of the grid takes its share of the items.

    Raises:
        UserError: a checkpoint is no model, or a folder holds or is being written by another evaluation.
    """
    first = open_source(places[0][0], work.weights, work.overrides)
    with _ranks(first.config) as mesh:
        number, count = work.shard
        replica, replicas, writes = 0, 1, True
        if mesh is not None:
            replica, replicas = mesh.dp.rank, mesh.dp.size
            writes = mesh.tp.first and mesh.cp.first and mesh.pp.first
        share = (number * replicas + replica, count * replicas, writes)
        for checkpoint, out in places:
            with ExitStack() as owned:
                lock = folder_lock(out, work.shard)
                on_rank0(lambda lock=lock, owned=owned: owned.enter_context(lock))  # type: ignore[misc]
                source = on_all_ranks(lambda: open_source(checkpoint, work.weights, work.overrides))  # noqa: B023
                on_rank0(lambda: claim(out / IDENTITY, _identity(work, source)))  # noqa: B023
                generate(work.suite, work.chosen, Pipeline(source, mesh, work.cache_tokens), work.settings, out, share)
                on_all_ranks(lambda: None)  # the lock is given back when every rank has written


@contextmanager
def _ranks(config: Config) -> Iterator[Mesh | None]:
    """The mesh of this job; None for a single process, which needs no process group."""
    world = read_launch_env()[1]
    if world == 1:
        configure_log(0)
        yield None
        return
    # As many packs as ranks: `check_world` then accepts every number of replicas.
    config = replace(config, train=replace(config.train, packs_per_step=world))
    with distributed(config) as mesh:
        configure_log(mesh.world.rank)
        yield mesh


def _identity(work: Work, source: Source) -> Record:
    """Facts that every start of an evaluation shares."""
    return {
        "suite": work.suite.name,
        "items": items_digest(work.items),
        "model": {"name": source.folder.name, "weights": source.weights, "digest": source.digest},
        "precision": source.config.train.precision,
        "settings": asdict(work.settings),
    }


def judge_stage(
    work: Work, outs: Sequence[Path], judge: Judge | None, templates: Mapping[str, str], parallel: int
) -> None:
    """Judge the outputs in each folder. In one process.

    Args:
        work: suite and chosen items.
        outs: folders of evaluations.
        judge: answers the suite's questions; None: the suite's own program.
        templates: texts of the questions by name, which replace the shipped ones.
        parallel: questions asked at a time.
    """
    for out in outs:
        _begun(out)
        with folder_lock(out):
            judge_outputs(work.suite, work.chosen, out, judge, templates, parallel)


def summarise_stage(work: Work, outs: Sequence[Path], rule: Rule) -> list[Record]:
    """Write table and summary in each folder; returns the summaries. In one process."""
    found = []
    for out in outs:
        _begun(out)
        with folder_lock(out):
            found.append(summarise(work.suite, work.chosen, out, work.settings.samples, rule))
    return found


def _begun(out: Path) -> None:
    if not (out / IDENTITY).is_file():
        raise UserError(f"{out}: holds no evaluation ({IDENTITY} is absent); run the stage generate first")

"""A run of a recipe: passes over all partitions, tables between them, and the report at the end."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megabagel.curation.engines import DIED, Engine, engine_of
from megabagel.curation.output import (
    Job,
    add_death,
    all_steps,
    bind,
    deaths,
    global_steps,
    is_set_aside,
    read_marker,
    stage_name,
    table_identity,
    tables_folder,
)
from megabagel.curation.partitions import Partition, digest_of
from megabagel.curation.read.reader import reader_of
from megabagel.curation.recipe import Recipe
from megabagel.curation.worker import DONE
from megabagel.errors import UserError
from megabagel.journal import write_json
from megabagel.locks import claimed

POLL_S = 0.5

logger = logging.getLogger(__name__)


def curate(recipe: Recipe, inputs: Sequence[Path], out: Path, engine: str = "local", workers: int = 1) -> None:
    """Run a recipe over input folders; started again, it goes on where it was stopped.

    Args:
        recipe: a checked recipe.
        inputs: folders, in order.
        out: output folder; one that holds the output of another recipe is refused.
        engine: local, slurm or ray.
        workers: processes, of this machine or of this task.

    Raises:
        UserError: bad input, an output folder of another recipe or input, or an engine that is not to be had.
    """
    runner = engine_of(engine, workers)
    options = {name: value for name, value in recipe.read.items() if name != "kind"}
    partitions = reader_of(recipe.read["kind"]).find(inputs, **options)
    bind(out, recipe)
    _refuse_strangers(out, partitions)
    logger.info("recipe %s: %d partitions; engine %s, %d workers", recipe.name, len(partitions), engine, workers)
    try:
        for number in global_steps(recipe):
            _run_pass(runner, Job(str(out), recipe, number), partitions)
            _make_tables(out, recipe, number, partitions)
        _run_pass(runner, Job(str(out), recipe, None), partitions)
    finally:
        runner.close()


def _refuse_strangers(out: Path, partitions: Sequence[Partition]) -> None:
    """Raise UserError if the folder holds partitions that the input has not."""
    names = {partition.name for partition in partitions}
    if strange := sorted(path.stem for path in (out / "done").glob("*.json") if path.stem not in names):
        raise UserError(
            f"{out}: holds {len(strange)} partitions that this input lacks, first {strange[0]}; name the same folders "
            "in --in, or choose another folder for --out"
        )


def _run_pass(engine: Engine, job: Job, partitions: Sequence[Partition]) -> None:
    """Complete all partitions in one pass, together with other processes that work on the same folder."""
    what = "shards" if job.stage is None else f"sketches of {stage_name(job.recipe, job.stage)}"
    todo = [partition for partition in partitions if not job.is_done(partition)]
    logger.info("%s: %d of %d partitions to do", what, len(todo), len(partitions))
    while todo:
        worked = 0
        for outcome in engine.run(job, todo):
            worked += outcome.status == DONE
            if outcome.status == DIED:
                _mourn(job, outcome.partition, outcome.reason)
        todo = [partition for partition in todo if not job.is_done(partition)]
        if todo and not worked:
            time.sleep(POLL_S)


def _mourn(job: Job, partition: Partition, reason: str) -> None:
    add_death(job.folder, partition, reason)
    number = len(deaths(job.folder, partition))
    aside = "; set aside" if is_set_aside(job.folder, partition) else "; tried again"
    logger.warning(
        "partition %s (%s, ...): its worker died (%s), time %d%s",
        *(partition.name, partition.files[0], reason, number, aside),
    )


def _make_tables(out: Path, recipe: Recipe, number: int, partitions: Sequence[Partition]) -> None:
    """Reduce the sketches of a step to its tables, in one process of all that work on the folder."""
    job = Job(str(out), recipe, number)
    folder = tables_folder(out, recipe, number)
    aside = [is_set_aside(out, partition) for partition in partitions]
    sketches = [job.identity(partition) for partition in partitions]
    identity = digest_of([sketches, aside])
    while table_identity(out, recipe, number) != identity:
        with claimed(out / "locks" / f"{folder.name}.lock", f"table {folder.name}") as mine:
            if mine and table_identity(out, recipe, number) != identity:
                _reduce(job, number, partitions, folder)
                write_json(folder / "complete.json", {"identity": identity})
        if not mine:
            time.sleep(POLL_S)


def _reduce(job: Job, number: int, partitions: Sequence[Partition], folder: Path) -> None:
    name, options = job.recipe.steps[number]
    reduce = all_steps()[name].reduce
    assert reduce is not None
    (folder / "complete.json").unlink(missing_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()

    def rows() -> Iterator[tuple[str, list[Any]]]:
        for partition in partitions:
            yield partition.name, read_marker(job.marker(partition)).get("rows", [])

    for partition_name, table in sorted(reduce(rows(), **options).items()):
        write_json(folder / f"{partition_name or 'all'}.json", table)


def done_records(out: Path) -> list[dict[str, Any]]:
    """The records of all complete partitions, in order.

    Raises:
        UserError: the folder is no output of `curate run`, or a record is damaged.
    """
    if not (out / "recipe.json").is_file():
        raise UserError(f"{out}: no output of `megabagel curate run` (no recipe.json in it)")
    found = []
    for path in sorted((out / "done").glob("*.json")):
        try:
            found.append(json.loads(path.read_bytes()))
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); remove it and run the recipe again") from error
    return found

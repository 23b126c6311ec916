"""Layout of an output folder, and what is complete in it.

recipe.json                  the recipe that the folder belongs to
shards/NAME-PARTITION-000000.tar     samples, for `data.sources`
provenance/PARTITION.jsonl   per sample: source, values and notes of the steps
done/PARTITION.json          counts, written last: a partition is complete or absent
sketches/NN-STEP/, tables/NN-STEP/   of steps that need all documents
deaths/PARTITION.jsonl       workers that died of a partition
answers/                     cache of the models' answers
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabagel.curation.partitions import Partition, digest_of
from megabagel.curation.recipe import Recipe, all_steps
from megabagel.curation.steps import Bound
from megabagel.errors import UserError
from megabagel.journal import Journal, read_journal, write_json
from megabagel.locks import inside, locked

MOST_DEATHS = 2
"""Workers that a partition may kill before it is set aside."""


@dataclass(frozen=True)
class Job:
    """A pass over all partitions: the sketches of one step, or the shards."""

    out: str
    recipe: Recipe
    stage: int | None
    """Number of the step to sketch; None writes the shards."""

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out)

    def marker(self, partition: Partition) -> Path:
        """The file that is there when the partition is done in this pass."""
        if self.stage is None:
            return self.folder / "done" / f"{partition.name}.json"
        return self.folder / "sketches" / stage_name(self.recipe, self.stage) / f"{partition.name}.json"

    def bound_steps(self, partition: Partition) -> list[Bound]:
        """The steps of this pass, with their tables."""
        found = []
        for number, (name, options) in enumerate(self.recipe.steps[: self.stage]):
            step = all_steps()[name]
            table = read_table(self.folder, self.recipe, number, partition) if step.reduce else None
            found.append(Bound(step, options, table))
        return found

    def identity(self, partition: Partition) -> str:
        """Digest of all that the result for a partition depends on."""
        tables = [table_identity(self.folder, self.recipe, n) for n in global_steps(self.recipe) if _before(n, self)]
        return digest_of([self.recipe.digest, partition.digest, self.stage, tables])

    def is_done(self, partition: Partition) -> bool:
        """Whether the partition is complete in this pass, or set aside."""
        identity = self.identity(partition)
        return read_marker(self.marker(partition)).get("identity") == identity or is_set_aside(self.folder, partition)


def _before(number: int, job: Job) -> bool:
    return job.stage is None or number < job.stage


def global_steps(recipe: Recipe) -> list[int]:
    """Numbers of the steps that need all documents."""
    return [number for number, (name, _) in enumerate(recipe.steps) if all_steps()[name].reduce]


def stage_name(recipe: Recipe, number: int) -> str:
    """Folder name of a step that needs all documents."""
    return f"{number:02d}-{recipe.steps[number][0]}"


def read_marker(path: Path) -> dict[str, Any]:
    """A marker file; empty if it is absent or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def tables_folder(out: Path, recipe: Recipe, number: int) -> Path:
    """Where the tables of a step are."""
    return out / "tables" / stage_name(recipe, number)


def table_identity(out: Path, recipe: Recipe, number: int) -> str:
    """Identity of the complete tables of a step; empty if there are none."""
    return str(read_marker(tables_folder(out, recipe, number) / "complete.json").get("identity", ""))


def read_table(out: Path, recipe: Recipe, number: int, partition: Partition) -> Any:
    """The table of a step for a partition: its own, else the one for all."""
    folder = tables_folder(out, recipe, number)
    for name in (partition.name, "all"):
        if (path := folder / f"{name}.json").is_file():
            return json.loads(path.read_bytes())
    return {}


def deaths(out: Path, partition: Partition) -> list[Mapping[str, Any]]:
    """Workers that died of these files."""
    path = out / "deaths" / f"{partition.name}.jsonl"
    return [record for record in read_journal(path) if record.get("partition") == partition.digest]


def is_set_aside(out: Path, partition: Partition) -> bool:
    """Whether a partition has killed too many workers to be tried again."""
    return len(deaths(out, partition)) >= MOST_DEATHS


def add_death(out: Path, partition: Partition, reason: str) -> None:
    """Remember a worker's death."""
    record = {"partition": partition.digest, "files": list(partition.files[:3]), "reason": reason}
    Journal(out / "deaths" / f"{partition.name}.jsonl").append(record)


def bind(out: Path, recipe: Recipe) -> None:
    """Make `out` the folder of a recipe.

    Raises:
        UserError: it belongs to another one, or cannot be written.
    """
    path = out / "recipe.json"
    wanted = recipe.identity()
    with locked(inside(out), str(out)):
        if not path.exists():
            write_json(path, wanted)
        found = read_marker(path)
    if found != json.loads(json.dumps(wanted)):
        differing = next((key for key in wanted if found.get(key) != wanted[key]), "contents")
        raise UserError(
            f"{out}: holds the output of another recipe (other {differing}); choose another folder for --out"
        )

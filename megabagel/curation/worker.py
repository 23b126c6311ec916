"""Work on one partition: read, run the steps, write; the same on every engine, and alone with its lock."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from megabagel.curation.draft import Draft, Picture
from megabagel.curation.models.seam import Models, open_models
from megabagel.curation.output import Job, all_steps
from megabagel.curation.partitions import Partition
from megabagel.curation.read.reader import Seen, reader_of
from megabagel.curation.samples import LAYOUTS, Sample
from megabagel.curation.steps import Bound, StepFailed, Tally, run_steps
from megabagel.data.formats.shards import write_shards
from megabagel.errors import UserError
from megabagel.journal import write_json, write_whole
from megabagel.locks import claimed

DONE, BUSY = "done", "busy"
"""Outcomes: complete, or in the hands of another process."""


def work(job: Job, partition: Partition) -> str:
    """Complete a partition in the pass of `job`, unless it is complete or another process works on it.

    Raises:
        UserError: the output folder cannot be written, or a model is not to be had; nothing of the partition is left.
    """
    for module in job.recipe.modules:
        import_module(module)
    with claimed(job.folder / "locks" / f"{partition.name}.lock", f"partition {partition.name}") as mine:
        if not mine:
            return BUSY
        if not job.is_done(partition):
            try:
                _shards(job, partition) if job.stage is None else _sketches(job, partition, job.stage)
            except OSError as error:
                raise UserError(f"{job.out}: partition {partition.name}: {error}") from error
    return DONE


def _sketches(job: Job, partition: Partition, number: int) -> None:
    """Write [key, sketch] of every document that reaches a step."""
    identity = job.identity(partition)
    name, options = job.recipe.steps[number]
    sketch = all_steps()[name].sketch
    assert sketch is not None
    run = _Run(job, partition)
    rows = [[draft.key, found] for draft in run.drafts() if (found := sketch(draft, run.models, **options)) is not None]
    write_json(job.marker(partition), {"identity": identity, "rows": rows})


def _shards(job: Job, partition: Partition) -> None:
    identity, out, name = job.identity(partition), job.folder, partition.name
    stage = out / "staging" / name
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    run = _Run(job, partition)
    prefix = f"{job.recipe.name}-{name}"
    paths = write_shards(stage, prefix, run.samples(), job.recipe.write["samples_per_shard"])
    record = {
        "identity": identity,
        "partition": name,
        "root": partition.root,
        "files": [len(partition.files), partition.files[0]],
        **run.account(),
        "shards": [{"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths],
    }
    # The marker goes first and comes last: whatever is there in between does not count.
    job.marker(partition).unlink(missing_ok=True)
    shards = out / "shards"
    shards.mkdir(exist_ok=True)
    for old in shards.glob(f"{prefix}-*.tar"):
        old.unlink()
    for path in paths:
        path.replace(shards / path.name)
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in run.provenance)
    write_whole(out / "provenance" / f"{name}.jsonl", "".join(lines))
    write_json(job.marker(partition), record)
    shutil.rmtree(stage, ignore_errors=True)


class _Run:
    """The documents of a partition on their way, and the account of them."""

    def __init__(self, job: Job, partition: Partition) -> None:
        self.job, self.partition, self.seen = job, partition, Seen()
        self.steps: Sequence[Bound] = job.bound_steps(partition)
        self.tallies = [Tally(bound.step.name) for bound in self.steps]
        self.writing = Tally("write")
        self.models: Models | None = open_models(job.recipe.models, job.folder / "answers")
        self.provenance: list[Mapping[str, Any]] = []
        self.samples_written = self.words = 0

    def drafts(self) -> Iterator[Draft]:
        """The documents that pass the steps, read a batch at a time."""
        options = {name: value for name, value in self.job.recipe.read.items() if name != "kind"}
        source = reader_of(self.job.recipe.read["kind"]).read(self.partition, self.seen, **options)
        while batch := list(islice(source, self.job.recipe.batch)):
            yield from self._passed(batch)

    def _passed(self, batch: Sequence[Draft]) -> list[Draft]:
        """What is left of a batch; if a step raises, its documents go alone, and the one at fault is counted."""
        tallies = [Tally(bound.step.name) for bound in self.steps]
        try:
            left = list(run_steps(batch, self.steps, tallies, self.job.recipe.seed, self.models))
        except StepFailed as error:
            if len(batch) > 1:
                return [draft for alone in batch for draft in self._passed([alone])]
            self.seen.fail(batch[0].source or batch[0].key, error.step, error.error)
            return []
        for total, tally in zip(self.tallies, tallies, strict=True):
            tally.check()
            total.add(tally)
        return left

    def samples(self) -> Iterator[Sample]:
        """Samples of the documents that can be written, with their provenance."""
        layout, tally = LAYOUTS[self.job.recipe.write["layout"]], self.writing
        for draft in self.drafts():
            tally.documents_in += 1
            tally.pictures_in += len(draft.pictures)
            samples = list(layout(draft)) if (reason := unwritable(draft)) is None else []
            if not samples:
                reason = reason or "nothing to write"
                tally.documents[reason] += 1
                tally.pictures[reason] += len(draft.pictures)
                tally.example(reason, draft.source or draft.key)
                continue
            tally.documents_out += 1
            tally.pictures_out += len(draft.pictures)
            self.words += len(draft.text.split())
            for key, files in samples:
                self.samples_written += 1
                self.provenance.append(
                    {"key": key, "source": draft.source, **dict(draft.meta), "notes": list(draft.notes)}
                )
                yield key, files

    def account(self) -> dict[str, Any]:
        """Counts of the partition as JSON; in = out + sum of reasons holds for every step."""
        self.writing.check()
        first = self.tallies[0].documents_in if self.tallies else self.writing.documents_in
        return {
            "read": dict(sorted(self.seen.records.items())),
            "documents": first + self.seen.failed,
            "failed": self.seen.failed,
            "failures": self.seen.failures,
            "steps": [as_json(tally) for tally in (*self.tallies, self.writing)],
            "samples": self.samples_written,
            "words": self.words,
        }


def unwritable(draft: Draft) -> str | None:
    """Why a document cannot be written, or None."""
    if draft.clips:
        return "an undecoded clip"
    return "a picture without a file" if any(picture.data is None for picture in pictures(draft.items)) else None


def pictures(items: Iterable[Any]) -> list[Picture]:
    """The pictures among items."""
    return [item for item in items if isinstance(item, Picture)]


def as_json(tally: Tally) -> dict[str, Any]:
    """A tally as JSON."""
    return {
        "step": tally.step,
        "documents": [tally.documents_in, tally.documents_added, tally.documents_out],
        "pictures": [tally.pictures_in, tally.pictures_added, tally.pictures_out],
        "documents_dropped": dict(sorted(tally.documents.items())),
        "pictures_dropped": dict(sorted(tally.pictures.items())),
        "examples": dict(sorted(tally.examples.items())),
    }


def from_json(value: Mapping[str, Any]) -> Tally:
    """The tally that `as_json` wrote."""
    tally = Tally(value["step"])
    tally.documents_in, tally.documents_added, tally.documents_out = value["documents"]
    tally.pictures_in, tally.pictures_added, tally.pictures_out = value["pictures"]
    tally.documents.update(value["documents_dropped"])
    tally.pictures.update(value["pictures_dropped"])
    tally.examples.update(value["examples"])
    return tally


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()

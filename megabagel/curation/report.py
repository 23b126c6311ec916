"""The report on an output folder: what became of every record, document and picture, by step and reason."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabagel.curation.models.seam import usage
from megabagel.curation.output import MOST_DEATHS
from megabagel.curation.run import done_records
from megabagel.curation.steps import Tally
from megabagel.curation.worker import from_json
from megabagel.journal import read_journal


@dataclass(frozen=True)
class Report:
    """Counts of all complete partitions."""

    partitions: int
    set_aside: tuple[str, ...]
    """First files of partitions that killed their workers."""
    read: dict[str, int]
    """Records by kind and reason."""
    documents: int
    failed: int
    failures: tuple[dict[str, str], ...]
    steps: tuple[Tally, ...]
    samples: int
    words: int
    shards: int
    size: int
    """Bytes of the shards."""
    models: dict[str, dict[str, float]]

    def as_json(self) -> str:
        """The report as JSON."""
        steps = [
            {
                "step": tally.step,
                "documents": [tally.documents_in, tally.documents_added, tally.documents_out],
                "pictures": [tally.pictures_in, tally.pictures_added, tally.pictures_out],
                "documents_dropped": dict(tally.documents),
                "pictures_dropped": dict(tally.pictures),
            }
            for tally in self.steps
        ]
        return json.dumps({**vars(self), "steps": steps}, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        lines = [f"partitions: {self.partitions} complete, {len(self.set_aside)} set aside"]
        lines += [f"  set aside after {MOST_DEATHS} dead workers: {name}" for name in self.set_aside]
        lines += [f"read: {sum(self.read.values())} records"]
        lines += [f"{number:10}  {kind}" for kind, number in sorted(self.read.items())]
        lines += ["", f"documents: {self.documents}, of which a step raised on {self.failed}"]
        lines += [f"  {x['source']}: {x['step']}: {x['error']}" for x in self.failures[:20]]
        lines += ["", *_table(self.steps), "", "dropped, by step and reason (documents, images)"]
        for tally in self.steps:
            for reason in sorted({*tally.documents, *tally.pictures}):
                counts = f"{tally.documents[reason]:8}{tally.pictures[reason]:8}"
                lines.append(f"{counts}  {tally.step}: {reason}")
            if tally.documents_added or tally.pictures_added:
                lines.append(f"{tally.documents_added:8}{tally.pictures_added:8}  {tally.step}: added")
        lines += ["", f"samples: {self.samples}, words: {self.words}, shards: {self.shards}, {self.size / 1e6:.1f} MB"]
        for name, row in self.models.items():
            tokens = f"{row['tokens_in']:.0f} + {row['tokens_out']:.0f} tokens"
            lines.append(f"model answers to {name}: {row['answers']:.0f}, {tokens}, cost {row['cost']:.4f}")
        return "\n".join(lines)


def _table(steps: Sequence[Tally]) -> list[str]:
    """In, added, dropped and out of every step."""
    width = max(len(tally.step) for tally in steps)
    columns = "".join(f"{name:>9}" for name in ("in", "added", "dropped", "out"))
    lines = [f"{'':{width}}  documents{'':28}  images", f"{'step':{width}}{columns}  {columns}"]
    for tally in steps:
        documents = (tally.documents_in, tally.documents_added, sum(tally.documents.values()), tally.documents_out)
        pictures = (tally.pictures_in, tally.pictures_added, sum(tally.pictures.values()), tally.pictures_out)
        cells = ["".join(f"{number:9}" for number in row) for row in (documents, pictures)]
        lines.append(f"{tally.step:{width}}{cells[0]}  {cells[1]}")
    return lines


def report_on(out: Path) -> Report:
    """The report on an output folder.

    Raises:
        UserError: it is no output folder, or damaged.
    """
    records = done_records(out)
    recipe = json.loads((out / "recipe.json").read_bytes())
    steps = [Tally(name) for name, _ in recipe["steps"]] + [Tally("write")]
    read: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    for record in records:
        read.update(record["read"])
        failures += record["failures"]
        for total, value in zip(steps, record["steps"], strict=True):
            total.add(from_json(value))
    shards: list[dict[str, Any]] = [shard for record in records for shard in record["shards"]]
    return Report(
        partitions=len(records),
        set_aside=tuple(_set_aside(out)),
        read=dict(sorted(read.items())),
        documents=sum(record["documents"] for record in records),
        failed=sum(record["failed"] for record in records),
        failures=tuple(failures),
        steps=tuple(steps),
        samples=sum(record["samples"] for record in records),
        words=sum(record["words"] for record in records),
        shards=len(shards),
        size=sum(shard["bytes"] for shard in shards),
        models=usage(out / "answers"),
    )


def _set_aside(out: Path) -> list[str]:
    found = []
    for path in sorted((out / "deaths").glob("*.jsonl")):
        records = read_journal(path)
        number = Counter(record.get("partition") for record in records)
        found += [f"{path.stem} ({r['files'][0]}, ...)" for r in records[-1:] if number[r["partition"]] >= MOST_DEATHS]
    return found

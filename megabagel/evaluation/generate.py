"""First stage of an evaluation: pictures and answers of a model, one record per item in OUT/generated.*.jsonl.

Items are dealt to replicas; each replica has a journal of its own, and what any journal holds is not made again. Seeds
are keyed by suite, item and sample, and a request's bits do not depend on the others that run beside it, so the outputs
are the same on any number of ranks and after any restart.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megabagel.errors import UserError
from megabagel.evaluation.suite import Item, Suite
from megabagel.inference.api import Pipeline
from megabagel.journal import Journal, Record, read_all, write_whole
from megabagel.runtime.collective_errors import from_rank0
from megabagel.sequence.keys import seed64

logger = logging.getLogger(__name__)

OUTPUTS, GENERATED = "outputs", "generated.*.jsonl"
TOGETHER = 16
"""Requests in work at a time; the engine batches them."""
Job = tuple[Item, int]
"""An item and the number of the sample."""


@dataclass(frozen=True)
class Settings:
    """How outputs are made; part of the identity of an evaluation."""

    preset: str | None
    size: tuple[int, int] | None
    """Width and height; None: the model's default, or the size of the last input image."""
    page: int
    """Side of drawn input pages, pixels."""
    steps: int | None
    think: bool
    samples: int
    max_new_tokens: int
    seed: int | None

    @classmethod
    def of(cls, suite: Suite, **given: Any) -> "Settings":
        """The suite's settings with those of `given` that are not None."""
        found = cls(
            preset=suite.preset,
            size=(suite.size, suite.size) if suite.size else None,
            page=suite.size or 0,
            steps=None,
            think=suite.think,
            samples=suite.samples,
            max_new_tokens=suite.max_new_tokens,
            seed=suite.seed,
        )
        changed = {name: value for name, value in given.items() if value is not None}
        if "size" in changed and suite.size:
            changed["page"] = changed["size"][0]
        return cls(**{**asdict(found), **changed})


def jobs(items: Sequence[Item], samples: int) -> list[Job]:
    """All outputs to make, in order."""
    return [(item, sample) for item in items for sample in range(1 if item["ability"] == "ask" else samples)]


def finished(out: Path) -> dict[tuple[str, int], Record]:
    """Records of outputs that are there, by item and sample. A picture whose file is gone counts as not made."""
    found: dict[tuple[str, int], Record] = {}
    for record in read_all(out.glob(GENERATED)):
        key = (record["id"], record["sample"])
        if "error" in record:
            continue
        if record.get("file") and not (out / OUTPUTS / record["file"]).is_file():
            logger.warning("%s: gone since it was made; it is made again", out / OUTPUTS / record["file"])
            found.pop(key, None)
            continue
        found[key] = record
    return found


def generate(
    suite: Suite, items: Sequence[Item], model: Pipeline, settings: Settings, out: Path, share: tuple[int, int, bool]
) -> None:
    """Make the outputs of this replica's share that are not there yet. Every rank of the replica calls it alike.

    Args:
        suite: the benchmark.
        items: all items to evaluate.
        model: of this rank.
        settings: of every output.
        out: folder of the evaluation.
        share: (number of this replica, number of replicas, whether this rank writes).
    """
    number, replicas, writes = share
    # As rank 0 sees them: on a shared disk other hosts may see a new file later.
    done = {tuple(key) for key in from_rank0(lambda: [list(key) for key in finished(out)])}
    mine = [job for job in jobs(items, settings.samples)[number::replicas] if (job[0]["id"], job[1]) not in done]
    logger.info("%s: %d outputs to make on replica %d of %d", suite.name, len(mine), number, replicas)
    journal = Journal(out / f"generated.{number}-of-{replicas}.jsonl") if writes else None
    for start in range(0, len(mine), TOGETHER):
        for job, result in _made(suite, mine[start : start + TOGETHER], model, settings):
            if journal is not None:
                journal.append(_record(suite, job, result, settings, out))


def _made(suite: Suite, part: Sequence[Job], model: Pipeline, settings: Settings) -> Iterator[tuple[Job, Any]]:
    """Run some jobs together; yields the result of each, or the UserError that it ended in."""
    submitted: list[tuple[Job, Any]] = []
    for job in part:
        try:
            submitted.append((job, _submit(suite, job, model, settings)))
        except UserError as error:
            submitted.append((job, error))
    for job, request in submitted:
        if isinstance(request, UserError):
            yield job, request
            continue
        for _ in model.stream(request):
            pass
        if request.done.error is not None:
            yield job, UserError(request.done.error)
        elif job[0]["ability"] == "ask":
            yield job, model.tokenizer.decode(request.done.result)
        else:
            yield job, request.done.result[0]


def _submit(suite: Suite, job: Job, model: Pipeline, settings: Settings) -> Any:
    item, sample = job
    shown = [model.open(image) for image in suite.inputs(item, settings.page)]
    if item["ability"] == "ask":
        return model.submit_answer([*shown, item["prompt"]], settings.think, max_new_tokens=settings.max_new_tokens)
    edits = item["ability"] == "edit"
    return model.submit_draw(
        [*shown, item["prompt"]],
        1,
        None if edits else settings.size,
        seed_of(suite, item, sample, settings),
        preset=settings.preset or ("edit" if edits else None),
        think=settings.think,
        points=settings.steps,
    )


def seed_of(suite: Suite, item: Item, sample: int, settings: Settings) -> int:
    """Seed of a picture: a function of suite, item and sample alone.

    Args:
        suite: its name is part of the key.
        item: of the suite.
        sample: number of the output among those of the item.
        settings: may fix the seed of sample 0, as GEdit's released script does.
    """
    if settings.seed is not None:
        return settings.seed + sample
    return seed64("evaluation", suite.name, item["id"], sample) & 0x7FFFFFFF


def _record(suite: Suite, job: Job, result: Any, settings: Settings, out: Path) -> Record:
    """Store an output; returns its record."""
    item, sample = job
    about: Record = {"id": item["id"], "sample": sample}
    if isinstance(result, UserError):
        logger.warning("%s, item %s: %s", suite.name, item["id"], result)
        return {**about, "error": str(result)}
    if isinstance(result, str):
        return {**about, "text": result}
    name = suite.output(item, sample)
    encoded = result.png()
    write_whole(out / OUTPUTS / name, encoded)
    digest = hashlib.sha256(encoded).hexdigest()
    thought = {"thought": result.about["thought"]} if result.about.get("thought") else {}
    record = {**about, "file": name, "sha256": digest, "seed": result.about["seed"], **thought}
    for path, content in suite.companions(item, record).items():
        write_whole(out / OUTPUTS / path, content)
    return record


def check_picture(path: Path) -> None:
    """Raise UserError for a picture that is missing or half written, by name."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: no whole picture ({error}); remove it and generate again") from error

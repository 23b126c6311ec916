"""Sites, recipes, and runs without processes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megabagel.curation import run as running
from megabagel.curation.engines import Outcome
from megabagel.curation.output import Job
from megabagel.curation.partitions import Partition
from megabagel.curation.recipe import checked
from megabagel.curation.report import Report, report_on
from megabagel.curation.worker import work
from tests.support.curation_pages import site

WEB: dict[str, Any] = {
    "name": "web",
    "read": {"kind": "web", "pages_per_partition": 3},
    "steps": [
        "missing_files",
        "damaged_files",
        {"image_sides": {"least": 100}},
        "image_clarity",
        "language",
        "near_duplicates",
        "repeated_paragraphs",
        "too_few_images",
        "caption_first",
    ],
    "write": {"samples_per_shard": 2},
}


class Inline:
    """An engine without processes; counts the partitions that it got."""

    def __init__(self) -> None:
        self.got: list[str] = []

    def run(self, job: Job, partitions: Sequence[Partition]) -> Iterator[Outcome]:
        for partition in partitions:
            self.got.append(partition.name)
            yield Outcome(partition, work(job, partition))

    def close(self) -> None:
        pass


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Inline:
    """`curate` with the engine `local` works in this process."""
    engine = Inline()
    monkeypatch.setattr(running, "engine_of", lambda name, workers: engine)
    return engine


def curated(recipe: dict[str, Any], folder: Path | Sequence[Path], out: Path, workers: int = 1) -> Report:
    running.curate(checked(recipe), [folder] if isinstance(folder, Path) else folder, out, "local", workers)
    return report_on(out)


def contents(out: Path) -> dict[str, bytes]:
    """Shards, provenance and counts of an output folder."""
    paths = [path for name in ("shards", "provenance", "done") for path in (out / name).glob("[!.]*")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of twelve pages, not to be changed."""
    return site(tmp_path_factory.mktemp("site"))

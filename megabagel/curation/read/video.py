"""Reader of video files; every file is one draft with one clip, which the step `shots` takes apart."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megabagel.curation.draft import Clip, Draft, plain_key
from megabagel.curation.partitions import Partition, files_below, in_groups, partitions_of
from megabagel.curation.read.reader import Reader, Seen, check_folders
from megabagel.errors import UserError

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv")


def find(inputs: Sequence[Path], *, videos_per_partition: int) -> list[Partition]:
    """One partition per group of video files."""
    check_folders(inputs)
    groups = [(root, group) for root in inputs for group in in_groups(files_below(root, VIDEOS), videos_per_partition)]
    if not groups:
        raise UserError(f"--in {', '.join(map(str, inputs))}: no videos in it ({', '.join(VIDEOS)})")
    return partitions_of(groups)


def read(partition: Partition, seen: Seen, *, videos_per_partition: int) -> Iterator[Draft]:
    """A clip of unknown length per file."""
    for number, (name, path) in enumerate(zip(partition.files, partition.paths, strict=True)):
        seen.records["video"] += 1
        key = f"{partition.name}-{number:06d}-{plain_key(path.stem)[:40]}"
        yield Draft(key, (Clip(str(path), 0, 0, 0.0),), name)


READER = Reader(find, read, {"videos_per_partition": 1})

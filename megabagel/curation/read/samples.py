"""Reader of the project's own shards (tar): what one recipe wrote, or any data set, becomes the input of the next."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from megabagel.curation.draft import Draft, Item, Picture, Text, plain_key
from megabagel.curation.partitions import Partition, files_below, partitions_of
from megabagel.curation.read.reader import Reader, Seen, check_folders, shard_files
from megabagel.data.documents import Member, SampleError
from megabagel.data.formats.declared import Declared, DeclaredText
from megabagel.data.formats.samples import declared_items
from megabagel.data.formats.shards import ShardReader, split_name
from megabagel.errors import UserError


def find(inputs: Sequence[Path]) -> list[Partition]:
    """One partition per tar file."""
    check_folders(inputs)
    groups = [(root, [path]) for root in inputs for path in files_below(root, (".tar",))]
    if not groups:
        raise UserError(f"--in {', '.join(map(str, inputs))}: no .tar shards in it")
    return partitions_of(groups)


def read(partition: Partition, seen: Seen) -> Iterator[Draft]:
    """Texts and images of every sample with their declared roles; of several wordings the first."""
    (path,) = partition.paths
    reader = ShardReader([path])
    files = shard_files(path, partition.files[0], seen)
    for number, (key, group) in enumerate(groupby(files, lambda file: split_name(file.name)[0])):
        members = {split_name(x.name)[1]: Member(0, x.offset, x.size) for x in group if not x.fault}
        try:
            declared = declared_items(members, reader.read)
        except SampleError as error:
            seen.records[f"sample: {error.reason}"] += 1
            continue
        seen.records["sample"] += 1
        items = tuple(item for entry in declared for item in _items(entry, reader))
        name = f"{partition.name}-{number:06d}-{plain_key(Path(key).name)[:40]}"
        yield Draft(name, items, f"{partition.files[0]}: {key}")


READER = Reader(find, read)


def _items(entry: Declared, reader: ShardReader) -> Iterator[Item]:
    if isinstance(entry, DeclaredText):
        if not entry.alternative and not entry.joined:
            yield Text(entry.text, entry.role or "")
    else:
        assert isinstance(entry.place, Member)
        yield Picture(entry.name, reader.read(entry.place), role=entry.role or "", frame=entry.frame)

"""Reader of captioned pictures: folders of NAME.jpg + NAME.txt, and tar shards of KEY.jpg + KEY.txt."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from megabagel.config.reading import read_file
from megabagel.curation.draft import Draft, Picture, Text, plain_key
from megabagel.curation.partitions import Partition, files_below, in_groups, partitions_of
from megabagel.curation.read.reader import Reader, Seen, check_folders, shard_files
from megabagel.data.documents import Member, SampleError
from megabagel.data.files import MAX_IMAGE_BYTES
from megabagel.data.formats.declared import MAX_TEXT_BYTES
from megabagel.data.formats.samples import IMAGE_EXTENSIONS, caption_text
from megabagel.data.formats.shards import ShardReader, split_name
from megabagel.errors import UserError, is_transient

SHARDS = (".tar",)


def find(inputs: Sequence[Path], *, images_per_partition: int) -> list[Partition]:
    """One partition per tar file, and one per group of image files."""
    check_folders(inputs)
    groups: list[tuple[Path, Sequence[Path]]] = []
    images = tuple(f".{extension}" for extension in sorted(IMAGE_EXTENSIONS))
    for root in inputs:
        groups += [(root, [path]) for path in files_below(root, SHARDS)]
        groups += [(root, group) for group in in_groups(files_below(root, images), images_per_partition)]
    if not groups:
        raise UserError(f"--in {', '.join(map(str, inputs))}: no images and no .tar shards in it")
    return partitions_of(groups)


def read(partition: Partition, seen: Seen, *, images_per_partition: int) -> Iterator[Draft]:
    """A caption, where there is one, and its picture."""
    if partition.files[0].lower().endswith(SHARDS):
        yield from _shard(partition, seen)
    else:
        yield from _folder(partition, seen)


READER = Reader(find, read, {"images_per_partition": 1000})


def _folder(partition: Partition, seen: Seen) -> Iterator[Draft]:
    for number, (name, path) in enumerate(zip(partition.files, partition.paths, strict=True)):
        try:
            data = read_file(path, MAX_IMAGE_BYTES)
        except OSError as error:
            if is_transient(error):
                raise
            seen.records[f"image: {error.strerror}"] += 1
            continue
        text = path.with_suffix(".txt")
        caption = _caption(read_file(text, MAX_TEXT_BYTES)) if text.is_file() else None
        yield _pair(partition, number, path.stem, name, caption, data, seen)


def _shard(partition: Partition, seen: Seen) -> Iterator[Draft]:
    (path,) = partition.paths
    reader = ShardReader([path])
    files = shard_files(path, partition.files[0], seen)
    for number, (key, group) in enumerate(groupby(files, lambda file: split_name(file.name)[0])):
        members = {split_name(x.name)[1]: Member(0, x.offset, x.size) for x in group if not x.fault}
        images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
        if len(images) != 1:
            seen.records[f"sample: {len(images)} images"] += 1
            continue
        caption = _caption(reader.read(members["txt"])) if "txt" in members else None
        data = reader.read(members[images[0]])
        yield _pair(partition, number, key, f"{partition.files[0]}: {key}", caption, data, seen)


def _pair(
    partition: Partition, number: int, stem: str, source: str, caption: str | None, data: bytes, seen: Seen
) -> Draft:
    seen.records["pair" if caption else "image without a caption"] += 1
    items = (Text(caption), Picture(source, data)) if caption else (Picture(source, data),)
    return Draft(f"{partition.name}-{number:06d}-{plain_key(Path(stem).name)[:40]}", items, source)


def _caption(data: bytes) -> str | None:
    try:
        return caption_text(data)
    except SampleError:  # the picture counts as one without a caption
        return None

"""Shard files of a source: finding them, detecting their format, and iterating over their samples."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from megabagel.data.documents import Member
from megabagel.data.formats import jsonl, parquet
from megabagel.data.formats.reader import Reader
from megabagel.data.formats.records import Declared
from megabagel.data.formats.samples import declared_items
from megabagel.data.formats.shards import list_files, split_name
from megabagel.data.index.index_cache import Skip
from megabagel.data.tar import BEHIND_THE_END
from megabagel.errors import UserError

Format = Literal["tar", "parquet", "jsonl"]

SUFFIXES: dict[str, Format] = {".tar": "tar", ".parquet": "parquet", ".jsonl": "jsonl"}
"""Format by file name suffix. Files of a folder with other suffixes are not taken as shards."""


@dataclass(frozen=True)
class Found:
    """A sample of a shard, not parsed yet: `declare` parses it, and raises SampleError if it is faulty."""

    key: str
    declare: Callable[[], list[Declared]]


def find_shards(root: Path, pattern: str) -> list[Path]:
    """Shards that match a path, sorted.

    Args:
        root: `data.root`; relative patterns are under it.
        pattern: a file, a glob, or a folder, which stands for its files that end in .tar, .parquet or .jsonl. Hidden
            files are left out.

    Raises:
        UserError: no file matches, or the glob is malformed.
    """
    anchor = Path(pattern).anchor
    folder = root / pattern
    try:
        if pattern and folder.is_dir():
            found = [path for path in folder.iterdir() if path.suffix in SUFFIXES]
        else:
            found = list((root / anchor).glob(pattern.removeprefix(anchor)))
        problem = f"no file matches under data.root, which {'exists' if root.is_dir() else 'does not exist'}"
    except (ValueError, IndexError) as error:  # pathlib on "", "a**b"
        found, problem = [], str(error)
    shards = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    if not shards:
        raise UserError(
            f"data.sources: path {pattern!r} with data.root = {str(root)!r}: {problem}. Expected WebDataset tars,"
            " parquet or JSONL files, for example 'train-*.tar', or a folder of them; `megabagel data prepare` builds"
            " tars from a folder of images and captions."
        )
    return shards


def format_of(shard: Path) -> Format:
    """Detect the format of a file from its first bytes.

    Raises:
        UserError: the suffix of its name names another format, or the file cannot be read.
    """
    try:
        with shard.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(
            f"{shard}: cannot be read ({error}). Bring the shard back or remove it from data.sources."
        ) from error
    by_name, start = SUFFIXES.get(shard.suffix), head.removeprefix(b"\xef\xbb\xbf")
    # First, because a tar begins with the name of its first file, which may look like one of the other formats.
    if head[257:].startswith((b"ustar\0", b"ustar  \0")):
        by_content: Format = "tar"
    elif start[:4] == b"PAR1":
        by_content = "parquet"
    elif start.lstrip()[:1] == b"[" and by_name in (None, "jsonl"):
        raise UserError(
            f"{shard}: holds a JSON array, expected JSONL with an object per line. Convert it, for example with"
            f" `jq -c '.[]' {shard.name} > {shard.stem}.jsonl`."
        )
    elif start.lstrip()[:1] == b"{":
        by_content = "jsonl"
    elif by_name == "jsonl" and not start.strip():
        by_content = "jsonl"  # an empty file is JSONL without a record
    else:
        by_content = "tar"  # an old format without a magic number; `tar.walk` checks its headers
    if by_name and by_name != by_content:
        raise UserError(
            f"{shard}: cannot be read as a shard (named {shard.suffix}, but it begins with {start[:8]!r}). Expected an"
            " uncompressed tar, a parquet file, or JSONL with an object per line: rename or rebuild it."
        )
    return by_content


def samples_of(reader: Reader, number: int, unused: Counter[str]) -> Iterator[Found | Skip]:
    """Iterate over the samples of one shard in order.

    Args:
        reader: reader of the source.
        number: number of the shard.
        unused: is updated with fields, columns and files that no layout uses, as samples are parsed.

    Returns:
        Iterator of samples, and of `Skip` for those that are unusable before they are parsed.

    Raises:
        UserError: the shard is missing, unreadable or of no known format.
    """
    shard = reader.shards[number]
    match format_of(shard):
        case "tar":
            yield from _tar(reader, number, unused)
        case "parquet":
            yield from (Found(key, declare) for key, declare in parquet.rows(reader.parquet, number, unused))
        case "jsonl":
            yield from (Found(key, declare) for key, declare in jsonl.lines(shard, number, reader.images, unused))


def _tar(reader: Reader, number: int, unused: Counter[str]) -> Iterator[Found | Skip]:
    shard = reader.shards[number]
    files, damage = list_files(shard)
    samples: dict[str, dict[str, Member]] = {}
    faults: dict[str, Skip] = {}
    for file in files:
        key, extension = split_name(file.name)
        if not key or key.endswith("/"):  # a hidden file
            continue
        if file.fault:
            faults[key] = Skip(shard.name, key, "no regular file", f"{file.name} is {file.fault}")
        if extension in samples.setdefault(key, {}):
            faults[key] = Skip(shard.name, key, "two files of one name", extension)
        samples[key][extension] = Member(number, file.offset, file.size)
    if damage:
        # What follows an end mark belongs to no sample; any other damage may have cut the last one.
        last = split_name(files[-1].name)[0] if files and not damage.startswith(BEHIND_THE_END) else ""
        faults[last] = Skip(shard.name, last, "damaged shard", damage)
    yield from faults.values()
    # Only after all headers were read: a fault of one file excludes its whole sample, and comes in any order.
    for key, sample in samples.items():
        if key not in faults:
            yield Found(key, partial(declared_items, sample, reader.files.read, unused))

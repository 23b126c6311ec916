"""Formats of shards: which files of a folder are shards, what format a file has, and the samples in it."""

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
"""Names of the shards in a folder."""


@dataclass(frozen=True)
class Found:
    """A sample: `declare` looks into it, and raises SampleError where it has a fault."""

    key: str
    declare: Callable[[], list[Declared]]


def find_shards(root: Path, pattern: str) -> list[Path]:
    """The shards that a glob or the name of a folder stands for, under `root` unless it is absolute, sorted.

    A folder stands for the files in it that end in .tar, .parquet or .jsonl. Hidden files are no shards.

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
    """The format of a file by its first bytes, which must agree with its name where that says one.

    Raises:
        UserError: they do not agree, or the file cannot be read.
    """
    try:
        with shard.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(
            f"{shard}: cannot be read ({error}). Bring the shard back or remove it from data.sources."
        ) from error
    by_name, start = SUFFIXES.get(shard.suffix), head.removeprefix(b"\xef\xbb\xbf")
    if head[257:].startswith((b"ustar\0", b"ustar  \0")):
        by_content: Format = "tar"  # whatever the name of its first file begins with
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
        by_content = "jsonl"  # without a record
    else:
        by_content = "tar"  # whose headers are checked one by one
    if by_name and by_name != by_content:
        raise UserError(
            f"{shard}: cannot be read as a shard (named {shard.suffix}, but it begins with {start[:8]!r}). Expected an"
            " uncompressed tar, a parquet file, or JSONL with an object per line: rename or rebuild it."
        )
    return by_content


def samples_of(reader: Reader, number: int, unused: Counter[str]) -> Iterator[Found | Skip]:
    """The samples of one shard in order, and those that are known to be unusable before one looks into them.

    `unused` counts fields, columns and files for which their samples have no use, as these are looked into.

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
    for key, sample in samples.items():
        if key not in faults:
            yield Found(key, partial(declared_items, sample, reader.files.read, unused))

"""The index of one source: key, roles, sizes and byte locations of every sample, known before the first step.

Every shard is scanned once: all records, all texts (for their token counts) and all images, which are decoded in full
so that no undecodable image reaches the planner. Faulty samples are counted and named, never fatal. A scan is cached on
disk (`index_cache.py`) and held as a table (`document_table.py`). Roles are assigned afterwards (`documents_view.py`),
so that several tasks share one cache.
"""

import logging
import os
import time
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from megabagel.config.schema import DataConfig, SourceConfig
from megabagel.data.decode import measure
from megabagel.data.documents import (
    Document,
    ImageItem,
    Item,
    Member,
    Passage,
    Place,
    SampleError,
    Task,
    TextItem,
)
from megabagel.data.files import allow_open_files
from megabagel.data.formats.reader import Reader
from megabagel.data.formats.records import Declared, DeclaredText
from megabagel.data.formats.samples import caption_text
from megabagel.data.index import index_cache
from megabagel.data.index.document_table import TableBuilder, joined
from megabagel.data.index.documents_view import Documents, usable
from megabagel.data.index.index_cache import Scan, Skip, State
from megabagel.data.index.shard_files import SUFFIXES, find_shards, samples_of
from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.errors import UserError, printable
from megabagel.log import RANK0
from megabagel.rewards.regions import BadReward, Reward

logger = logging.getLogger(__name__)

INLINE_BYTES = 1024
"""Texts up to this many UTF-8 bytes are held in the index; longer ones are read from their shard when needed."""
_CHECK = "`megabagel data index --check` finds such shards and indexes them again"
NAMED_UNUSED = 20
"""Most unused fields that a message lists."""
NAMED_SKIPS = 5
"""Most skipped samples that a log message lists; `Index.skipped` has all."""


@dataclass(frozen=True)
class Index:
    """The usable samples of one source, in a fixed order: shards by path, then position in the shard.

    `fingerprint` depends on the documents alone (keys, roles, sizes, checksums, task, tokenizer), not on the paths or
    times of the shards. With equal fingerprints a saved data state can be resumed.
    """

    documents: Sequence[Document]
    skipped: tuple[Skip, ...]
    fingerprint: str
    reader: Reader = field(repr=False)
    unused: Mapping[str, int] = field(default_factory=dict)
    """Fields, columns and files that no layout uses, with the number of samples that have each."""

    def read(self, place: Place) -> bytes:
        """Read the bytes of one image, without a check of their checksum; raises as `Reader.read` does."""
        return self.reader.read(place)

    def image(self, item: ImageItem) -> bytes:
        """Read the bytes of one image and compare them with the checksum in the index.

        At the start of a run only the size and time of a shard are compared; a shard that was restored with other
        contents may have both unchanged.

        Raises:
            SampleError: the bytes differ from those that were indexed.
            UserError: as `read`.
        """
        data = self.reader.read(item.member)
        if item.crc is not None and zlib.crc32(data) != item.crc:
            raise SampleError("changed since it was indexed", _CHECK)
        return data

    def text(self, item: TextItem) -> str:
        """Read the text of one item and compare it with the checksum in the index.

        Raises:
            SampleError: the text differs from the one that was indexed.
            UserError: as `read`.
        """
        match item.source:
            case str(text):
                return text
            case Member() as file:
                text = caption_text(self.reader.files.read(file))
            case Passage() as part:
                text = self.reader.text(part)
        if item.crc is not None and zlib.crc32(text.encode()) != item.crc:
            raise SampleError("changed since it was indexed", _CHECK)
        return text

    def __str__(self) -> str:
        reasons = Counter(skip.reason for skip in self.skipped)
        counts = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        line = f"samples: {len(self.documents)}, skipped: {len(self.skipped)}, shards: {len(self.reader.shards)}"
        return "; ".join(filter(None, (line, counts, self.not_used())))

    def not_used(self) -> str:
        """Line that lists the unused fields, columns and files; empty if there are none."""
        most = Counter(self.unused).most_common()
        named = ", ".join(f"{printable(name)} ({count})" for name, count in most[:NAMED_UNUSED])
        more = f" and {len(most) - NAMED_UNUSED} more" if len(most) > NAMED_UNUSED else ""
        return f"not used: {named}{more}" if most else ""


def index_source(data: DataConfig, source: SourceConfig, tokenizer: TextTokenizer, *, check: bool = False) -> Index:
    """Index one entry of `data.sources`; see `build_index`.

    Args:
        data: root folder of the shards and folder of the cached scans.
        source: path pattern, task and image folder of the source.
        tokenizer: counts the token ids of texts.
        check: compare the contents of all shards with the cached scans.

    Raises:
        UserError: as `build_index`, or no shard matches the path.
    """
    root = Path(data.root)
    images = root / source.images if source.images else None
    cache = Path(data.index_dir) if data.index_dir else None
    shards = find_shards(root, source.path)
    return build_index(shards, tokenizer, source.task, images=images, cache=cache, check=check)


def build_index(
    shards: Sequence[Path],
    tokenizer: TextTokenizer,
    task: Task,
    *,
    images: Path | None = None,
    cache: Path | None = None,
    check: bool = False,
) -> Index:
    """Index the samples of `shards` for `task`.

    Args:
        shards: tar, parquet and JSONL files; their order is the order of the samples.
        tokenizer: counts the token ids of texts.
        task: decides the roles of items; a document that does not suit it is skipped and counted.
        images: folder to which image paths in JSONL files are relative; default: the folder of the first shard.
        cache: folder of the cached scans; default: `.index` beside each shard.
        check: compare the digest of every shard with the cached scan, also if its modification time is unchanged.

    Raises:
        UserError: a shard is missing or of no known format, or no sample at all is usable.
    """
    allow_open_files()
    reader = Reader(shards, images or shards[0].parent)
    counted = tokenizer.fingerprint()

    def scan(number: int) -> Scan:
        # "verify" (images were decoded in full) is constant. Removing it would change the name of every cache file, and
        # all shards would be indexed again.
        how = {"tokenizer": counted, "verify": True, "images": _images_of(reader, number)}
        path = index_cache.file_of(shards[number], cache, how)
        found = index_cache.load(path, shards[number], check=check)
        if found is None:
            found = _scan(reader.scanning(), number, tokenizer)
            index_cache.save(path, found)
        return found

    # Results in the order of the shards, whichever scan finishes first: sample numbers must not depend on timing.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scans = list(pool.map(scan, range(len(shards))))
    table = joined([found.table for found in scans])
    numbers, unusable = usable(table, task)
    ends = list(accumulate(len(found.table) for found in scans))
    skipped = [skip for found in scans for skip in found.skipped]
    for number, fault in unusable:
        skipped.append(Skip(shards[bisect_right(ends, number)].name, table.key(number), fault.reason, fault.detail))
    documents = Documents(table, numbers, task, tokenizer.fingerprint())
    unused = sum((Counter(found.unused) for found in scans), Counter())
    index = Index(documents, tuple(skipped), documents.fingerprint(), reader, unused)
    _report(index, task)
    return index


def _images_of(reader: Reader, number: int) -> str:
    """Image folder of a JSONL shard, part of the key of its cached scan; empty for other formats.

    Relative to the shard, so that the cache stays valid if both are moved together.
    """
    if SUFFIXES.get(reader.shards[number].suffix, "jsonl") != "jsonl":
        return ""
    return os.path.relpath(reader.images.resolve(), reader.shards[number].parent.resolve())


def _scan(reader: Reader, number: int, tokenizer: TextTokenizer) -> Scan:
    """Read and measure every sample of one shard."""
    shard, start = reader.shards[number], time.perf_counter()
    # Before the samples are read: if the shard changes meanwhile, the recorded digest no longer fits it, and the next
    # start scans it again.
    state = State.of(shard)
    builder, skipped, count, unused = TableBuilder(), [], 0, Counter[str]()
    for found in samples_of(reader, number, unused):
        if isinstance(found, Skip):
            skipped.append(found)
            continue
        try:
            items, checksums = zip(*_measured(found.declare(), tokenizer, reader), strict=True)
            builder.add(found.key, items, checksums)
            count += 1
        except SampleError as error:
            skipped.append(Skip(shard.name, found.key, error.reason, error.detail))
        except MemoryError as error:
            raise UserError(
                f"{shard}: {found.key}: no memory left to decode it. Free some and start again; what is indexed stays."
            ) from error
    seconds = time.perf_counter() - start
    logger.info("indexed %s: samples: %d, skipped: %d (%.1f s)", shard, count, len(skipped), seconds)
    return Scan(builder.table(), tuple(skipped), state, unused)


def _measured(declared: Sequence[Declared], tokenizer: TextTokenizer, reader: Reader) -> Iterator[tuple[Item, int]]:
    """Determine the sizes of declared items; yields (item, CRC-32 of its content)."""
    sizes: list[tuple[int, int]] = []
    for one in declared:
        if isinstance(one, DeclaredText):
            data = one.text.encode()
            assert one.place is not None
            source = one.text if len(data) <= INLINE_BYTES else one.place
            ids = 0 if one.role == "reward" else len(tokenizer.encode(one.text))
            if one.role == "reward":
                _check_reward(one.text, sizes)
            yield TextItem(ids, source, one.role, one.alternative, one.joined), zlib.crc32(data)
            continue
        data = reader.read(one.place)
        try:
            height, width = measure(data, verify=True)
        except SampleError as error:
            raise SampleError(error.reason, ": ".join(filter(None, (one.name, error.detail)))) from error
        sizes.append((height, width))
        yield ImageItem(height, width, one.place, one.role, one.frame), zlib.crc32(data)


def _check_reward(text: str, sizes: Sequence[tuple[int, int]]) -> None:
    """Compare scores with the pictures before them: the judged one, and the second target where there is one."""
    height, width = sizes[0]
    try:
        Reward.from_json(text).check_size(width, height)
    except BadReward as error:
        raise SampleError(error.reason, error.detail) from error
    if any(size != sizes[0] for size in sizes):
        shown = " and ".join(f"{width} x {height}" for height, width in sizes)
        raise SampleError("reward: good and bad picture differ in size", shown)


def _report(index: Index, task: Task) -> None:
    """Log the counts of an index; UserError if no sample is usable."""
    shards = index.reader.shards
    name = str(shards[0]) if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
    if not index.documents:
        first = f" The first: {index.skipped[0]}." if index.skipped else ""
        raise UserError(
            f"{name}: no sample is usable for task {task!r}: {index}.{first} Expected per sample of a tar an image and"
            " a KEY.txt caption, a KEY.txt alone, or a KEY.json with items; per row or line one of the layouts in"
            " docs/data.md. Choose another task or mend the shards."
        )
    named = "".join(f"\n  {skip}" for skip in index.skipped[:NAMED_SKIPS])
    level = logging.WARNING if named else logging.INFO
    logger.log(level, "index %s (%s): %s%s", name, task, index, named, extra=RANK0)

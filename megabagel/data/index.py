"""The index of one source: every sample's key, roles and sizes, and where its bytes lie, before any step runs.

Shards are read once: every tar header, every text (for its token count) and every image, which is decoded in full so
that nothing undecodable reaches the planner. Samples with a fault are counted and named, never fatal. What was found is
cached (`index_cache.py`); roles are assigned afterwards, so that several tasks share one cache.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megabagel.config.schema import DataConfig, SourceConfig
from megabagel.data import index_cache
from megabagel.data.decode import measure
from megabagel.data.documents import Document, ImageItem, Item, Member, SampleError, Task, TextItem, assign_roles
from megabagel.data.index_cache import Scan, Skip
from megabagel.data.samples import Declared, DeclaredText, caption_text, declared_items
from megabagel.data.shards import ShardReader, list_files, split_name
from megabagel.data.tokenizer import TextTokenizer
from megabagel.errors import UserError

logger = logging.getLogger(__name__)

INLINE_BYTES = 1024
"""A text file up to this size is held in the index; a longer one is read when it is needed."""
NAMED_SKIPS = 5
"""Skipped samples that a log message names; `Index.skipped` has all."""


@dataclass(frozen=True)
class Index:
    """The usable samples of one source, in stable order: shards by path, then the order in the tar.

    `fingerprint` depends on the documents alone (keys, roles, sizes, texts), not on where the shards lie or how old
    they are: equal fingerprints mean that a saved data state fits.
    """

    documents: tuple[Document, ...]
    skipped: tuple[Skip, ...]
    fingerprint: str
    reader: ShardReader = field(repr=False)

    def read(self, member: Member) -> bytes:
        """The bytes of one file; raises UserError when its shard is gone or changed."""
        return self.reader.read(member)

    def text(self, item: TextItem) -> str:
        """The text of one item."""
        return item.source if isinstance(item.source, str) else caption_text(self.read(item.source))

    def __str__(self) -> str:
        reasons = Counter(skip.reason for skip in self.skipped)
        counts = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        line = f"samples: {len(self.documents)}, skipped: {len(self.skipped)}, shards: {len(self.reader.shards)}"
        return f"{line}; {counts}" if counts else line


def index_source(data: DataConfig, source: SourceConfig, tokenizer: TextTokenizer) -> Index:
    """The index of one entry of `data.sources`; see `build_index`."""
    return build_index(find_shards(Path(data.root), source.path), tokenizer, source.task)


def find_shards(root: Path, pattern: str) -> list[Path]:
    """The shards that a glob names, under `root` unless it is absolute, sorted.

    Raises:
        UserError: no file matches, or the glob is malformed.
    """
    anchor = Path(pattern).anchor
    try:
        shards = sorted(path for path in (root / anchor).glob(pattern.removeprefix(anchor)) if path.is_file())
        problem = f"no file matches under data.root, which {'exists' if root.is_dir() else 'does not exist'}"
    except (ValueError, IndexError) as error:  # pathlib on "", ".", "a**b"
        shards, problem = [], str(error)
    if not shards:
        raise UserError(
            f"data.sources: path {pattern!r} with data.root = {str(root)!r}: {problem}. Expected WebDataset tars, for"
            " example 'train-*.tar'; `megabagel data prepare` builds them from a folder of images and captions."
        )
    return shards


def build_index(
    shards: Sequence[Path],
    tokenizer: TextTokenizer,
    task: Task,
    *,
    cache: Path | None = None,
    verify: bool = True,
) -> Index:
    """Index the samples of `shards` for `task`.

    Args:
        shards: tar files, in the order in which they are to be indexed.
        tokenizer: counts the token ids of texts.
        task: decides the roles of items; a document that does not suit it is skipped and counted.
        cache: folder of the cached scan; default: beside the first shard.
        verify: decode every image in full; without, a damaged one may come up in training.

    Raises:
        UserError: a shard is missing or not a tar, or no sample at all is usable.
    """
    store = (cache or shards[0].parent) / index_cache.file_name(shards, tokenizer.fingerprint())
    stamp = index_cache.stamp(shards, tokenizer.fingerprint(), verify)
    reader = ShardReader(shards)
    scan = index_cache.load(store, stamp)
    if scan is None:
        scan = _scan(reader, tokenizer, verify)
        index_cache.save(store, stamp, scan)
    documents, skipped = _for_task(task, scan, reader)
    index = Index(documents, skipped, _fingerprint(documents), reader)
    _report(index, task)
    return index


def _scan(reader: ShardReader, tokenizer: TextTokenizer, verify: bool) -> Scan:
    """Look into every sample of every shard; shards are scanned in parallel, their order is kept."""

    def scan_shard(number: int) -> Scan:
        samples, skipped = _group(reader.shards[number], number)
        documents = []
        for key, files in samples.items():
            try:
                items = declared_items(files, reader.read)
                measured = tuple(_measure(item, tokenizer, reader, verify) for item in items)
                documents.append((number, Document(key, measured)))
            except SampleError as error:
                skipped.append(Skip(reader.shards[number].name, key, error.reason, error.detail))
        return Scan(documents, skipped)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scans = list(pool.map(scan_shard, range(len(reader.shards))))
    return Scan([pair for scan in scans for pair in scan.documents], [skip for scan in scans for skip in scan.skipped])


def _group(shard: Path, number: int) -> tuple[dict[str, dict[str, Member]], list[Skip]]:
    """{key: {extension: member}} of one shard, and the samples that are already known to be unusable."""
    files, damage = list_files(shard)
    samples: dict[str, dict[str, Member]] = {}
    faults: dict[str, Skip] = {}
    for file in files:
        key, extension = split_name(file.name)
        if not key or key.endswith("/"):  # a hidden file
            continue
        if extension in samples.setdefault(key, {}):
            faults[key] = Skip(shard.name, key, "two files of one name", extension)
        samples[key][extension] = Member(number, file.offset, file.size)
    if damage:
        last = split_name(files[-1].name)[0] if files else ""
        faults[last] = Skip(shard.name, last, "damaged shard", damage)
    return {key: sample for key, sample in samples.items() if key not in faults}, list(faults.values())


def _measure(declared: Declared, tokenizer: TextTokenizer, reader: ShardReader, verify: bool) -> Item:
    if isinstance(declared, DeclaredText):
        member = declared.member
        source = member if member and member.size > INLINE_BYTES else declared.text
        return TextItem(len(tokenizer.encode(declared.text)), source, declared.role)
    try:
        height, width = measure(reader.read(declared.member), verify=verify)
    except SampleError as error:
        raise SampleError(error.reason, ": ".join(filter(None, (declared.name, error.detail)))) from error
    return ImageItem(height, width, declared.member, declared.role)


def _for_task(task: Task, scan: Scan, reader: ShardReader) -> tuple[tuple[Document, ...], tuple[Skip, ...]]:
    documents, skipped = [], list(scan.skipped)
    for shard, document in scan.documents:
        try:
            documents.append(assign_roles(task, document))
        except SampleError as error:
            skipped.append(Skip(reader.shards[shard].name, document.key, error.reason, error.detail))
    return tuple(documents), tuple(skipped)


def _fingerprint(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.key, [_content(item) for item in document.items]]).encode())
    return digest.hexdigest()


def _content(item: Item) -> list[object]:
    """What an item is, without where it lies."""
    if isinstance(item, TextItem):
        return ["text", item.role, item.n_ids, item.source if isinstance(item.source, str) else item.source.size]
    return ["image", item.role, item.height, item.width, item.member.size]


def _report(index: Index, task: Task) -> None:
    shards = index.reader.shards
    name = str(shards[0]) if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
    if not index.documents:
        raise UserError(
            f"{name}: no sample is usable for task {task!r}: {index}. Expected per sample an image and a KEY.txt"
            " caption, a KEY.txt alone, or a KEY.json with items; choose another task or mend the shards."
        )
    named = "".join(f"\n  {skip}" for skip in index.skipped[:NAMED_SKIPS])
    logger.log(logging.WARNING if named else logging.INFO, "index %s (%s): %s%s", name, task, index, named)

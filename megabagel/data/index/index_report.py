"""Output of `megabagel data index`: counts of one source, and its skipped samples by name."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megabagel.data.index.document_table import IMAGE
from megabagel.data.index.documents_view import Documents
from megabagel.data.index.index import Index
from megabagel.data.index.index_cache import Skip


def survey(index: Index, title: str, named: int | None) -> str:
    """Report on an index as text.

    Args:
        index: the index of one source.
        title: first line.
        named: number of skipped samples that are listed by name; None lists all.
    """
    lines = [title, f"  samples: {len(index.documents)}, skipped: {len(index.skipped)}"]
    assert isinstance(index.documents, Documents)
    lines += _items(index.documents)
    shards = index.reader.shards
    size = sum(shard.stat().st_size for shard in shards)
    lines.append(f"  shards: {len(shards)}, {size / 1e6:,.1f} MB; fingerprint {index.fingerprint}")
    lines += [f"  {index.not_used()}"] if index.unused else []
    return "\n".join(lines + _skipped(index.skipped, named))


def _items(documents: Documents) -> list[str]:
    """Lines with counts of texts and images of the usable samples; every wording and every frame counts."""
    items = documents.table.chosen(documents.numbers).items
    is_image = (items["kind"] & IMAGE).astype(bool)
    texts, images = items[~is_image], items[is_image]
    lines = []
    if len(texts):
        ids = texts["high"]
        lines.append(f"  texts: {len(texts)}, ids: {ids.sum(dtype=np.int64)}, longest: {ids.max()}")
    if len(images):
        pixels = images["high"].astype(np.int64) * images["wide"]
        small, large = images[pixels.argmin()], images[pixels.argmax()]
        sizes = " to ".join(f"{image['wide']} x {image['high']}" for image in (small, large))
        lines.append(f"  images: {len(images)}, {sizes} pixels, {pixels.mean() / 1e6:.2f} million on average")
    return lines


def _skipped(skipped: Sequence[Skip], named: int | None) -> list[str]:
    counts = Counter(skip.reason for skip in skipped)
    lines = [f"  skipped, {count} x {reason}" for reason, count in counts.most_common()]
    lines += [f"    {skip}" for skip in skipped[:named]]
    if named is not None and len(skipped) > named:
        lines.append(f"    and {len(skipped) - named} more; --all names them")
    return lines

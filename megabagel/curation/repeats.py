"""Repeats over all documents: near-equal pictures, and paragraphs that a site has on many pages."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from megabagel.curation.draft import Draft, Item, Text, joined
from megabagel.curation.measure.look import look
from megabagel.curation.measure.pictures import difference_hash, near_groups
from megabagel.curation.measure.texts import paragraphs
from megabagel.curation.models.seam import Models
from megabagel.curation.partitions import digest_of
from megabagel.curation.steps import Context, step, without_pictures
from megabagel.errors import UserError

Rows = Iterator[tuple[str, list[Any]]]
"""Per partition, in order: its name, and [key, sketch] of its documents."""


def _hashes(draft: Draft, models: Models | None, *, bits: int) -> list[str]:
    return [f"{difference_hash(look(picture.data or b'').grey):016x}" for picture in draft.pictures]


def _all_but_the_first(rows: Rows, *, bits: int) -> dict[str, Any]:
    """By partition: {key: numbers of the pictures that are near to one before them, in any partition}."""
    if not 0 <= bits <= 7:
        raise UserError(f"near_duplicates.bits: {bits}; expected 0 to 7")
    places: list[tuple[str, str, int]] = []
    hashes: list[int] = []
    for partition, documents in rows:
        for key, found in documents:
            places += [(partition, key, number) for number in range(len(found))]
            hashes += [int(value, 16) for value in found]
    tables: dict[str, Any] = {partition: {} for partition, _, _ in places}
    groups = near_groups(np.array(hashes, dtype=np.uint64), bits) if hashes else ()
    for place, first in enumerate(groups):
        if first != place:
            partition, key, number = places[place]
            tables[partition].setdefault(key, []).append(number)
    return tables


@step(sketch=_hashes, reduce=_all_but_the_first)
def near_duplicates(drafts: Iterable[Draft], context: Context, *, bits: int = 3) -> Iterator[Draft]:
    """Keep the first of pictures whose 64-bit difference hashes differ in at most `bits`, over all documents."""
    for draft in drafts:
        again = set(context.table.get(draft.key, ()))
        reasons = ["near duplicate" if number in again else None for number in range(len(draft.pictures))]
        yield without_pictures(draft, context, "near_duplicates", reasons)


def _site(draft: Draft) -> str:
    return urlsplit(draft.source).netloc or draft.source.partition("/")[0]


def _paragraph_digests(draft: Draft, models: Models | None, *, words: int, **options: Any) -> list[Any]:
    short = [piece for piece in paragraphs(draft.text) if len(piece.split()) <= words]
    return [_site(draft), [digest_of(piece)[:12] for piece in short]]


def _on_many_pages(rows: Rows, *, share: float, pages: int, **options: Any) -> dict[str, Any]:
    """For all: {site: digests of paragraphs on at least `pages` pages and `share` of the site's}."""
    total: Counter[str] = Counter()
    found: dict[str, Counter[str]] = {}
    for _, documents in rows:
        for _, (site, digests) in documents:
            total[site] += 1
            found.setdefault(site, Counter()).update(digests)
    return {
        "": {
            site: sorted(digest for digest, n in counts.items() if n >= max(pages, share * total[site]))
            for site, counts in found.items()
        }
    }


@step(sketch=_paragraph_digests, reduce=_on_many_pages)
def repeated_paragraphs(
    drafts: Iterable[Draft], context: Context, *, share: float = 0.3, pages: int = 4, words: int = 60
) -> Iterator[Draft]:
    """Header and footer trimming: take out paragraphs of up to `words` words that many pages of a site have.

    A paragraph goes if at least `pages` pages and a `share` of the pages of its site (host, or top folder) have it.
    """
    for draft in drafts:
        many = set(context.table.get(_site(draft), ()))
        items: list[Item] = []
        trimmed = 0
        for item in draft.items:
            if isinstance(item, Text):
                pieces = item.text.split("\n\n")
                kept = [piece for piece in pieces if digest_of(" ".join(piece.split()))[:12] not in many]
                trimmed += len(pieces) - len(kept)
                item = replace(item, text="\n\n".join(kept))
            items.append(item)
        if trimmed:
            yield replace(draft, items=joined(items)).noted(f"repeated_paragraphs: {trimmed} paragraphs taken out")
        else:
            yield draft

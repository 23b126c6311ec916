"""The seam between a corpus and its quality rules: filters in a row, each counted on its own.

A filter takes a stream of documents and gives back a stream: fewer documents, documents with fewer pictures, or a long
one in parts. A rule looks at one picture or one document at a time (`by_picture`, `by_document`); a filter with a model
behind it may draw as many documents as it wants in a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps

from corpus_parts.draft import Draft, Picture

Filter = Callable[[Iterable[Draft]], Iterable[Draft]]


def by_picture(keep: Callable[[Picture], bool]) -> Filter:
    """The filter that takes pictures out of documents, one by one."""

    @wraps(keep)
    def run(drafts: Iterable[Draft]) -> Iterator[Draft]:
        return (draft.keeping(keep) for draft in drafts)

    return run


def by_document(keep: Callable[[Draft], bool]) -> Filter:
    """The filter that drops whole documents."""

    @wraps(keep)
    def run(drafts: Iterable[Draft]) -> Iterator[Draft]:
        return (draft for draft in drafts if keep(draft))

    return run


@dataclass
class Tally:
    """What passed one point of the row."""

    documents: int = 0
    images: int = 0


@dataclass(frozen=True)
class Report:
    """What went into and came out of every step. `tallies` has one entry more than `steps`; final once all is drawn."""

    steps: tuple[str, ...]
    tallies: tuple[Tally, ...]

    @property
    def images(self) -> int:
        """Images that came in."""
        return self.tallies[0].images

    def __str__(self) -> str:
        width = max(map(len, self.steps))
        lines = [
            f"{'':{width}}  documents                   images",
            f"{'step':{width}} " + "      in     out dropped " * 2,
        ]
        for step, before, after in zip(self.steps, self.tallies, self.tallies[1:], strict=False):
            counts = ((before.documents, after.documents), (before.images, after.images))
            cells = (f"{first:8}{last:8}{first - last:8} " for first, last in counts)
            lines.append(f"{step:{width}}" + "".join(cells))
        return "\n".join(line.rstrip() for line in lines)


def run_filters(drafts: Iterable[Draft], filters: Sequence[Filter]) -> tuple[Iterator[Draft], Report]:
    """The documents that are left, drawn one at a time, and a report that counts while they are."""
    tallies = tuple(Tally() for _ in range(len(filters) + 1))
    stream = _counted(drafts, tallies[0])
    for step, tally in zip(filters, tallies[1:], strict=True):
        stream = _counted(step(stream), tally)
    return stream, Report(tuple(step.__name__.replace("_", " ") for step in filters), tallies)


def _counted(drafts: Iterable[Draft], tally: Tally) -> Iterator[Draft]:
    for draft in drafts:
        tally.documents += 1
        tally.images += len(draft.pictures)
        yield draft

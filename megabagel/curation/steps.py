"""Steps: generator functions over drafts that count, by reason, everything they leave out.

A step takes a stream of documents and gives back a stream: fewer documents, documents with fewer pictures, or a long
one in parts. It keeps no state from one document to the next, so that the result depends neither on the order of
documents nor on how many workers share them; what needs all documents (near-duplicates, a classifier) has a `sketch`
and a `reduce`, and reads their table (`run.py`).

    @by_picture
    def aspect_ratio(picture, *, least: float = 1 / 2, most: float = 2) -> str | None:      the reason to drop, or None

Keyword-only parameters are the options of the step in a recipe, with their defaults.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megabagel.curation.draft import Draft, Picture
from megabagel.errors import UserError, is_transient

if TYPE_CHECKING:
    from megabagel.curation.models.seam import Models

EXAMPLES = 3
"""Keys of dropped documents that are kept for each reason."""


@dataclass
class Tally:
    """Counts of one step. For documents and for pictures: in + added = out + sum of dropped."""

    step: str
    documents_in: int = 0
    documents_out: int = 0
    documents_added: int = 0
    pictures_in: int = 0
    pictures_out: int = 0
    pictures_added: int = 0
    documents: Counter[str] = field(default_factory=Counter)
    """Documents dropped, by reason."""
    pictures: Counter[str] = field(default_factory=Counter)
    """Pictures dropped, by reason; those of a dropped document count under the reason of the document."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """By reason, the first few sources of what was dropped."""

    def example(self, reason: str, source: str) -> None:
        """Remember a source for a reason, up to EXAMPLES."""
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES and source not in kept:
            kept.append(source)

    def add(self, other: "Tally") -> None:
        """Add the counts of another part of the documents."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.documents += other.documents
        self.pictures += other.pictures
        for reason, sources in other.examples.items():
            for source in sources:
                self.example(reason, source)

    def check(self) -> None:
        """Raise AssertionError if something went without a reason."""
        for kind, dropped in (("documents", self.documents), ("pictures", self.pictures)):
            come, gone, added = (getattr(self, f"{kind}_{name}") for name in ("in", "out", "added"))
            lost = sum(dropped.values())
            assert come + added == gone + lost, f"{self.step}: {kind} {come} + {added} != {gone} + {lost}"


_NUMBERS = tuple(f"{kind}_{name}" for kind in ("documents", "pictures") for name in ("in", "out", "added"))


@dataclass(frozen=True)
class Context:
    """Surroundings of a running step."""

    tally: Tally
    seed: int = 0
    table: Any = None
    """Result of the step's `reduce`; None for a step without one."""
    models: "Models | None" = None

    def drop(self, draft: Draft, reason: str) -> None:
        """Count a document, with its pictures, as dropped."""
        self.tally.documents[reason] += 1
        self.tally.pictures[reason] += len(draft.pictures)
        self.tally.pictures += Counter()  # removes zeros
        self.tally.example(reason, draft.source or draft.key)

    def drop_picture(self, draft: Draft, picture: Picture, reason: str) -> None:
        """Count one picture of a document as dropped."""
        self.tally.pictures[reason] += 1
        self.tally.example(reason, f"{draft.source or draft.key}: {picture.source}" if picture.source else draft.key)

    def added(self, documents: int = 0, pictures: int = 0) -> None:
        """Count documents and pictures that the step makes beside those that came in."""
        self.tally.documents_added += documents
        self.tally.pictures_added += pictures


Run = Callable[..., Iterator[Draft]]


@dataclass(frozen=True)
class Step:
    """A step by name, with its options."""

    name: str
    run: Run
    """(drafts, context, **options) -> drafts."""
    options: Mapping[str, inspect.Parameter]
    sketch: Callable[..., Any] | None = None
    """(draft, models, **options) -> a small JSON value, for steps that need all documents; None leaves it out."""
    reduce: Callable[..., dict[str, Any]] | None = None
    """(iterator of (partition, [[key, sketch], ...]) in order, **options) -> table by partition; "" is for all."""

    def __call__(self, drafts: Iterable[Draft], context: Context | None = None, **options: Any) -> Iterator[Draft]:
        """Run the step alone."""
        return self.run(drafts, context or Context(Tally(self.name)), **options)


REGISTRY: dict[str, Step] = {}
"""All steps by name; filled when a module of steps is imported."""


def step(run: Run | None = None, *, sketch: Any = None, reduce: Any = None) -> Any:
    """Decorator: register a generator function `(drafts, context, *, options)` as a step under its name."""
    if run is None:
        return functools.partial(step, sketch=sketch, reduce=reduce)
    parameters = inspect.signature(run).parameters.values()
    options = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    made = Step(run.__name__, run, options, sketch, reduce)
    assert REGISTRY.get(made.name, made).run.__module__ == run.__module__, f"two steps are called {made.name}"
    REGISTRY[made.name] = made
    return made


def by_picture(rule: Callable[..., str | None]) -> Step:
    """Register a rule on one picture, which returns the reason to drop it or None, as a step."""

    @functools.wraps(rule)
    def run(drafts: Iterable[Draft], context: Context, **options: Any) -> Iterator[Draft]:
        for draft in drafts:
            yield without_pictures(draft, context, rule.__name__, [rule(p, **options) for p in draft.pictures])

    made: Step = step(run)
    return made


def without_pictures(draft: Draft, context: Context, name: str, reasons: Sequence[str | None]) -> Draft:
    """The document without the pictures that have a reason; each is counted, and the document noted.

    Args:
        draft: the document.
        context: of the step.
        name: of the step.
        reasons: per picture, in order, the reason to drop it, or None.
    """
    dropped = Counter(reason for reason in reasons if reason)
    if not dropped:
        return draft
    for picture, reason in zip(draft.pictures, reasons, strict=True):
        if reason:
            context.drop_picture(draft, picture, reason)
    left = iter(reasons)
    kept = draft.keeping(lambda _: next(left) is None)
    counts = ", ".join(f"{number} x {why}" for why, number in dropped.items())
    return kept.noted(f"{name}: pictures dropped: {counts}")


def by_document(rule: Callable[..., str | None]) -> Step:
    """Register a rule on one document, which returns the reason to drop it or None, as a step."""

    @functools.wraps(rule)
    def run(drafts: Iterable[Draft], context: Context, **options: Any) -> Iterator[Draft]:
        for draft in drafts:
            if reason := rule(draft, **options):
                context.drop(draft, reason)
            else:
                yield draft

    made: Step = step(run)
    return made


@dataclass(frozen=True)
class Bound:
    """A step with the options of a recipe, and its table."""

    step: Step
    options: Mapping[str, Any] = field(default_factory=dict)
    table: Any = None


class StepFailed(Exception):
    """A step raised on a document; `step` is its name, the cause the error."""

    def __init__(self, step: str, error: Exception) -> None:
        super().__init__(f"{step} raised {type(error).__name__}")
        self.step, self.error = step, error


def run_steps(
    drafts: Iterable[Draft],
    steps: Sequence[Bound],
    tallies: Sequence[Tally],
    seed: int = 0,
    models: "Models | None" = None,
) -> Iterator[Draft]:
    """The documents that pass all steps, drawn one at a time.

    Args:
        drafts: documents to look at.
        steps: in order.
        tallies: one per step; final once all documents are drawn.
        seed: key of all random draws.
        models: the models of the recipe, for steps that ask one.

    Raises:
        StepFailed: a step raised; UserError and failures of the machine pass as they are.
    """
    stream: Iterable[Draft] = drafts
    for bound, tally in zip(steps, tallies, strict=True):
        context = Context(tally, seed, bound.table, models)
        stream = _counted(stream, tally, "in")
        stream = _named(bound.step.name, bound.step.run(stream, context, **bound.options))
        stream = _counted(stream, tally, "out")
    return iter(stream)


def _named(name: str, stream: Iterator[Draft]) -> Iterator[Draft]:
    try:
        yield from stream
    except (StepFailed, UserError, MemoryError):
        raise
    except Exception as error:
        if is_transient(error):
            raise
        raise StepFailed(name, error) from error


def _counted(drafts: Iterable[Draft], tally: Tally, side: str) -> Iterator[Draft]:
    documents, pictures = f"documents_{side}", f"pictures_{side}"
    for draft in drafts:
        setattr(tally, documents, getattr(tally, documents) + 1)
        setattr(tally, pictures, getattr(tally, pictures) + len(draft.pictures))
        yield draft


def table_of(tallies: Sequence[Tally]) -> str:
    """In, out and dropped of every step as a table of text."""
    names = [tally.step.replace("_", " ") for tally in tallies]
    width = max(map(len, names), default=4)
    lines = [
        f"{'':{width}}  documents                   images",
        f"{'step':{width}} " + "      in     out dropped " * 2,
    ]
    for name, tally in zip(names, tallies, strict=True):
        counts = ((tally.documents_in, tally.documents_out), (tally.pictures_in, tally.pictures_out))
        lines.append(f"{name:{width}}" + "".join(f"{first:8}{last:8}{first - last:8} " for first, last in counts))
    return "\n".join(line.rstrip() for line in lines)

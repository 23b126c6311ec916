"""Steps that go wrong on purpose, for recipes of tests (`modules: [tests.support.curation_steps]`)."""

import os
import signal
from collections.abc import Iterable, Iterator

from megabagel.curation.draft import Draft
from megabagel.curation.steps import Context, by_document, step


@by_document
def raises_on(draft: Draft, *, name: str = "") -> str | None:
    """Raise on documents whose source has `name` in it."""
    if name and name in draft.source:
        raise ZeroDivisionError(f"in {draft.source}")
    return None


@by_document
def dies_on(draft: Draft, *, name: str = "") -> str | None:
    """Kill the process on documents whose source has `name` in it."""
    if name and name in draft.source:
        os.kill(os.getpid(), signal.SIGKILL)
    return None


@step
def counts_batches(drafts: Iterable[Draft], context: Context) -> Iterator[Draft]:
    """Note how many documents come at a time."""
    batch = list(drafts)
    yield from (draft.noted(f"batch of {len(batch)}") for draft in batch)

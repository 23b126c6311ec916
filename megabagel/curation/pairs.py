"""Rules on captioned pictures (BAGEL section 3.2); those on the pictures alone are in `web.py`.

The paper names resolution, aspect ratio, text length, deduplication, clarity and concept-aware sampling without
thresholds: the defaults here are ours.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from megabagel.curation.draft import Draft, Item, Text
from megabagel.curation.measure.texts import content_words, count_tokens, first_tokens
from megabagel.curation.models.seam import Models, Question
from megabagel.curation.partitions import digest_of
from megabagel.curation.repeats import Rows
from megabagel.curation.rewrite import chat_of
from megabagel.curation.steps import Context, by_document, step
from megabagel.sequence.keys import uniform


@by_document
def one_picture(draft: Draft) -> str | None:
    """A pair has one picture: earlier rules may have taken it."""
    return None if len(draft.pictures) == 1 else "no picture left"


@by_document
def caption_length(draft: Draft, *, least: int = 3, most: int = 300) -> str | None:
    """Text length: tokens of the caption, counted by `count_tokens`."""
    tokens = count_tokens(draft.text)
    if tokens < least:
        return "caption too short" if tokens else "no caption"
    return "caption too long" if tokens > most else None


def _caption_digest(draft: Draft, models: Models | None, *, most: int) -> str:
    return digest_of(" ".join(draft.text.lower().split()))


def _beyond(rows: Rows, *, most: int) -> dict[str, Any]:
    """By partition: keys of documents whose caption `most` documents before them have."""
    seen: Counter[str] = Counter()
    tables: dict[str, Any] = {}
    for partition, documents in rows:
        tables[partition] = []
        for key, digest in documents:
            seen[digest] += 1
            if seen[digest] > most:
                tables[partition].append(key)
    return tables


@step(sketch=_caption_digest, reduce=_beyond)
def repeated_captions(drafts: Iterable[Draft], context: Context, *, most: int = 5) -> Iterator[Draft]:
    """Of documents with the same caption ("image", "click to enlarge") keep the first `most`."""
    gone = set(context.table)
    for draft in drafts:
        if draft.key in gone:
            context.drop(draft, "repeated caption")
        else:
            yield draft


def _concepts(draft: Draft, models: Models | None, *, limit: int) -> list[str]:
    return content_words(draft.text)


def _frequent(rows: Rows, *, limit: int) -> dict[str, Any]:
    """For all: how many documents have each word, of words that more than `limit` have."""
    counts: Counter[str] = Counter()
    for _, documents in rows:
        for _, words in documents:
            counts.update(words)
    return {"": {word: number for word, number in counts.items() if number > limit}}


@step(sketch=_concepts, reduce=_frequent)
def balance_concepts(drafts: Iterable[Draft], context: Context, *, limit: int = 20_000) -> Iterator[Draft]:
    """Concept-aware sampling: keep all documents of rare concepts and about `limit` of each frequent one.

    Concepts are the content words of the caption. A document stays with the probability limit / count of its rarest
    one, by a draw that is keyed by the document.
    """
    for draft in drafts:
        words = content_words(draft.text)
        chance = max((limit / context.table[word] if word in context.table else 1.0 for word in words), default=1.0)
        if uniform(context.seed, "balance_concepts", draft.key) < chance:
            yield draft
        else:
            context.drop(draft, "frequent concept")


@step
def recaption(
    drafts: Iterable[Draft], context: Context, *, by: str = "model", keep: bool = False, most_tokens: int = 120
) -> Iterator[Draft]:
    """Let a model write the caption; with `keep` only where there is none."""
    batch = list(drafts)
    models = chat_of(context, "recaption", by, "")
    assert models is not None
    asked = [draft for draft in batch if draft.pictures and not (keep and draft.text)]
    questions = [Question("caption", (draft.pictures[0].data or b"",), most_tokens) for draft in asked]
    captions = dict(zip((draft.key for draft in asked), models.ask(questions), strict=True))
    for draft in batch:
        caption = first_tokens(" ".join(captions.get(draft.key, "").split()), most_tokens)
        if not caption:
            yield draft
        else:
            items: tuple[Item, ...] = (Text(caption), *draft.pictures)
            yield replace(draft, items=items).noted("recaption: by a model", caption_was=draft.text)

"""Steps that write or cut text: captions before pictures, summaries of long passages, trimming by a model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from megabagel.curation.draft import Draft, Item, Picture, Text, joined
from megabagel.curation.measure.texts import count_tokens, first_tokens
from megabagel.curation.models.seam import Models, Question
from megabagel.curation.steps import Context, step
from megabagel.curation.topics import json_in
from megabagel.errors import UserError


def chat_of(context: Context, where: str, by: str, local: str) -> Models | None:
    """The model that a step asks; None for its local rule.

    Raises:
        UserError: `by` is neither, or there is no model.
    """
    if by == local:
        return None
    if by != "model" or context.models is None:
        raise UserError(f"{where}.by: {by!r}; expected {local}, or model with models.chat in the recipe")
    return context.models


@step
def caption_first(
    drafts: Iterable[Draft], context: Context, *, by: str = "alt", most_tokens: int = 80
) -> Iterator[Draft]:
    """Put a caption before every picture, so that what is drawn is first said.

    `by: model` asks for captions; `by: alt` takes the text that the page gives for a picture, where it gives one.
    """
    batch = list(drafts)
    models = chat_of(context, "caption_first", by, "alt")
    pictures = [picture for draft in batch for picture in draft.pictures]
    if models:
        captions = models.ask([Question("caption", (picture.data or b"",), most_tokens) for picture in pictures])
    else:
        captions = [picture.alt for picture in pictures]
    left = iter(first_tokens(" ".join(caption.split()), most_tokens) for caption in captions)
    for draft in batch:
        items: list[Item] = []
        written = 0
        for item in draft.items:
            if isinstance(item, Picture) and (caption := next(left)):
                written += 1
                items.append(Text(f"\n\n{caption}\n\n"))
            items.append(item)
        yield replace(draft, items=joined(items)).noted(f"caption_first: {written} captions by {by}")


@step
def long_texts(drafts: Iterable[Draft], context: Context, *, most: int = 300, by: str = "sentences") -> Iterator[Draft]:
    """Shorten passages between pictures of more than the paper's 300 tokens, counted by `count_tokens`.

    `by: model` asks for a summary; `by: sentences` keeps the first sentences, paragraph by paragraph.
    """
    batch = list(drafts)
    models = chat_of(context, "long_texts", by, "sentences")
    passages = [
        item.text
        for draft in batch
        for item in draft.items
        if isinstance(item, Text) and count_tokens(item.text) > most
    ]
    asked = models.ask([Question("summary", (passage,), most) for passage in passages]) if models else passages
    left = iter(asked)
    for draft in batch:
        items: list[Item] = []
        shortened = 0
        for item in draft.items:
            if isinstance(item, Text) and count_tokens(item.text) > most:
                shortened += 1
                item = replace(item, text=f"{first_tokens(next(left).strip(), most)}\n\n")
            items.append(item)
        yield (
            draft
            if not shortened
            else replace(draft, items=tuple(items)).noted(f"long_texts: {shortened} passages by {by}")
        )


@step
def trim(drafts: Iterable[Draft], context: Context, *, by: str = "model", words: int = 12) -> Iterator[Draft]:
    """Take out the paragraphs that a model names as header, footer or menu; it sees their first `words` words."""
    batch = list(drafts)
    models = chat_of(context, "trim", by, "")
    pieces = [_paragraphs(draft) for draft in batch]
    if models is None:
        raise UserError("trim.by: expected model; without one, take repeated_paragraphs")
    answers = models.ask([Question("trim", (_numbered(found, words),), 200) for found in pieces])
    for draft, found, answer in zip(batch, pieces, answers, strict=True):
        numbers = json_in(answer)
        if not isinstance(numbers, list) or len(numbers) > len(found) / 2:
            # More than half is no header or footer; a wrong answer must not empty a page.
            yield draft.noted("trim: the answer was of no use")
            continue
        gone = {number for number in numbers if type(number) is int}
        yield _without_paragraphs(draft, gone) if gone else draft


def _paragraphs(draft: Draft) -> list[str]:
    return [piece for item in draft.items if isinstance(item, Text) for piece in item.text.split("\n\n")]


def _numbered(pieces: Sequence[str], words: int) -> str:
    return "\n".join(f"{number} {' '.join(piece.split()[:words])}" for number, piece in enumerate(pieces))


def _without_paragraphs(draft: Draft, gone: set[int]) -> Draft:
    items: list[Item] = []
    number = 0
    for item in draft.items:
        if isinstance(item, Text):
            pieces = item.text.split("\n\n")
            kept = [piece for place, piece in enumerate(pieces, number) if place not in gone]
            number += len(pieces)
            item = replace(item, text="\n\n".join(kept))
        items.append(item)
    return replace(draft, items=joined(items)).noted(f"trim: {len(gone)} paragraphs taken out by a model")

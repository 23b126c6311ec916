"""Reasoning traces (BAGEL section 3.3.3): pictures and edits become samples with a thought before the result.

Four recipes: `think_t2i` from captioned pictures, `think_edit` from edits, `think_video` from frames with the change
between them, `think_concept` from pictures of web documents. Each writes the system prompt, what is given, the thought
in <think> tags, and the result. The paper draws the pictures of its first recipe with a text-to-image model; here they
are those of the pairs, for which a model invents the vague request.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from megabagel.curation.draft import Draft, Item, Picture, Text
from megabagel.curation.measure.texts import count_tokens, first_tokens
from megabagel.curation.models.seam import Models, Question
from megabagel.curation.rewrite import chat_of
from megabagel.curation.steps import Context, by_document, step
from megabagel.curation.topics import json_in
from megabagel.inference.prompts import THINK_BEFORE_IMAGE

SPARE = 4
"""Times the cap that a model may write: an answer cut by the cap itself would end anywhere."""
TELLTALE = (
    r"\b(given|provided|target|output|resulting|second|final|ground.truth) (image|picture|photo|answer|frame)\b"
    r"|\bas an ai\b|\bi cannot\b"
)
"""Words of a thought that knows its result, or of a refusal."""


@step
def think_t2i(
    drafts: Iterable[Draft], context: Context, *, by: str = "model", most_tokens: int = 60
) -> Iterator[Draft]:
    """From a captioned picture: a vague request, a thought, the picture."""
    batch = list(_having(drafts, context, pictures=1))
    models = _models(context, "think_t2i", by)
    asked = models.ask([Question("vague_query", (draft.text,), 60) for draft in batch])
    questions = [
        Question("think_t2i", (f"Request: {query.strip()}", f"Picture: {draft.text}"), SPARE * most_tokens)
        for draft, query in zip(batch, asked, strict=True)
    ]
    for draft, query, thought in zip(batch, asked, models.ask(questions), strict=True):
        given = (Text(query.strip(), "condition"),)
        yield from _with_thought(draft, context, given, thought, draft.pictures[0], most_tokens)


@step
def think_edit(
    drafts: Iterable[Draft], context: Context, *, by: str = "model", most_tokens: int = 60
) -> Iterator[Draft]:
    """From an edit (picture, instruction, picture): a thought that says what changes and what stays, layout too."""
    yield from _edits(drafts, context, "think_edit", by, most_tokens)


@step
def think_video(
    drafts: Iterable[Draft], context: Context, *, by: str = "model", most_tokens: int = 60
) -> Iterator[Draft]:
    """From two frames and the change between them: a thought as for an edit, but the layout may change."""
    yield from _edits(drafts, context, "think_video", by, most_tokens)


def _edits(drafts: Iterable[Draft], context: Context, prompt: str, by: str, most_tokens: int) -> Iterator[Draft]:
    batch = [(draft, _edit_of(draft)) for draft in _having(drafts, context, pictures=2)]
    models = _models(context, prompt, by)
    found = []
    for draft, edit in batch:
        if edit is None:
            context.drop(draft, "no instruction between two pictures")
        else:
            found.append((draft, *edit))
    questions = [
        Question(prompt, (before.data or b"", wish, after.data or b""), SPARE * most_tokens)
        for _, before, wish, after in found
    ]
    for (draft, before, wish, after), thought in zip(found, models.ask(questions), strict=True):
        given = (replace(before, role="condition", frame=False), Text(wish, "condition"))
        yield from _with_thought(draft, context, given, thought, after, most_tokens)


@step
def think_concept(
    drafts: Iterable[Draft], context: Context, *, by: str = "model", least: int = 4, most_tokens: int = 200
) -> Iterator[Draft]:
    """From the pictures of a document, in three stages: a pair, a request, a judgement; then the thought.

    Pairs that the model judges below `least` of 5 are dropped, and thoughts that repeat the answer's text.
    """
    batch = list(_having(drafts, context, pictures=2))
    models = _models(context, "think_concept", by)
    pairs = dict(_concept_pairs(batch, models, context))
    asked = dict(_concept_questions(batch, pairs, models, context))
    left = [draft for draft in batch if draft.key in asked]
    parts = {
        draft.key: (pairs[draft.key][0].data or b"", asked[draft.key][0], pairs[draft.key][1].data or b"")
        for draft in left
    }
    scores = models.ask([Question("concept_judge", parts[draft.key], 8) for draft in left])
    good = [draft for draft, score in zip(left, scores, strict=True) if _judged(draft, score, least, context)]
    questions = [
        Question("think_concept", (*parts[draft.key], asked[draft.key][1]), SPARE * most_tokens) for draft in good
    ]
    for draft, thought in zip(good, models.ask(questions), strict=True):
        before, after = pairs[draft.key]
        request, answer = asked[draft.key]
        if _squeezed(answer) in _squeezed(thought):
            context.drop(draft, "thought repeats the answer")
            continue
        given = (replace(before, role="condition"), Text(request, "condition"))
        yield from _with_thought(draft, context, given, thought, after, most_tokens, answer)


def _concept_pairs(
    batch: Sequence[Draft], models: Models, context: Context
) -> Iterator[tuple[str, tuple[Picture, Picture]]]:
    """(key, (input, output)) of the documents in which the model finds a pair."""
    questions = []
    for draft in batch:
        parts: list[str | bytes] = []
        for item in draft.items:
            if isinstance(item, Picture):
                parts += [f"Picture {sum(isinstance(part, bytes) for part in parts)}:", item.data or b""]
            elif isinstance(item, Text):
                parts.append(first_tokens(item.text, 200))
        questions.append(Question("concept_pair", tuple(parts), 40))
    for draft, answer in zip(batch, models.ask(questions), strict=True):
        match json_in(answer):
            case {"input": int(one), "output": int(other)} if one != other and {one, other} <= {
                *range(len(draft.pictures))
            }:
                yield draft.key, (draft.pictures[one], draft.pictures[other])
            case _:
                context.drop(draft, "no pair of pictures")


def _concept_questions(
    batch: Sequence[Draft], pairs: Mapping[str, tuple[Picture, Picture]], models: Models, context: Context
) -> Iterator[tuple[str, tuple[str, str]]]:
    """(key, (request, sentence that goes with the output)) of the documents for which the model writes one."""
    left = [draft for draft in batch if draft.key in pairs]
    questions = [
        Question("concept_question", (*(p.data or b"" for p in pairs[draft.key]), first_tokens(draft.text, 400)), 200)
        for draft in left
    ]
    for draft, answer in zip(left, models.ask(questions), strict=True):
        match json_in(answer):
            case {"question": str(request), "answer": str(text)} if request.strip() and text.strip():
                yield draft.key, (request.strip(), text.strip())
            case _:
                context.drop(draft, "no request")


def _judged(draft: Draft, answer: str, least: int, context: Context) -> bool:
    found = re.search(r"[1-5]", answer)
    if found is None:
        context.drop(draft, "no judgement")
    elif int(found[0]) < least:
        context.drop(draft, f"judged below {least}")
    return found is not None and int(found[0]) >= least


def _models(context: Context, where: str, by: str) -> Models:
    models = chat_of(context, where, by, "")
    assert models is not None
    return models


def _having(drafts: Iterable[Draft], context: Context, pictures: int) -> Iterator[Draft]:
    """Documents with text and enough pictures."""
    for draft in drafts:
        if len(draft.pictures) < pictures or not draft.text:
            context.drop(draft, "too few pictures or no text")
        else:
            yield draft


def _edit_of(draft: Draft) -> tuple[Picture, str, Picture] | None:
    """The first picture, instruction, picture of a document."""
    before: Picture | None = None
    wish = ""
    for item in draft.items:
        if isinstance(item, Picture):
            if before is not None and wish:
                return before, wish, item
            before, wish = item, ""
        elif isinstance(item, Text):
            wish = item.text.strip()
    return None


def _with_thought(
    draft: Draft,
    context: Context,
    given: Sequence[Item],
    thought: str,
    result: Picture,
    most_tokens: int,
    answer: str = "",
) -> Iterator[Draft]:
    """The document as a sample with a thought, if the thought is of use; its other pictures are counted as dropped.

    Args:
        draft: the document it is made from.
        context: of the step.
        given: what comes before the thought.
        thought: the model's words.
        result: the picture that the thought leads to.
        most_tokens: cap; a longer thought is cut after a sentence.
        answer: a sentence after the picture; empty: none.
    """
    words = " ".join(re.sub(r"</?think>", " ", thought).split())
    cut = first_tokens(words, most_tokens)
    if reason := useless(cut):
        context.drop(draft, reason)
        return
    target = replace(result, role="target", frame=False)
    items: list[Item] = [Text(THINK_BEFORE_IMAGE, "condition"), *given]
    items += [Text(f"<think>{cut}</think>", "target"), target]
    if answer:
        items.append(Text(answer, "target"))
    kept = sum(isinstance(item, Picture) for item in items)
    if surplus := len(draft.pictures) - kept:
        context.tally.pictures["not part of the sample"] += surplus
    tokens = count_tokens(cut)
    yield replace(draft, items=tuple(items)).noted(f"{context.tally.step}: thought of {tokens} tokens", tokens=tokens)


def useless(thought: str) -> str | None:
    """Why a thought cannot be used, or None."""
    if count_tokens(thought) < 8:
        return "thought too short"
    return "thought knows the result" if re.search(TELLTALE, thought, re.IGNORECASE) else None


def _squeezed(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


@by_document
def thought_quality(draft: Draft) -> str | None:
    """Check thoughts of samples that others made: none too short, no refusal, none that names its result."""
    found = re.findall(r"<think>(.*?)</think>", draft.text, re.DOTALL)
    return next((reason for thought in found if (reason := useless(thought))), None if found else "no thought")

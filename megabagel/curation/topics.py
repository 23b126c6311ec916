"""Topic selection in two passes: rules or a model label a small part, a fast classifier labels all.

The classifier is fastText's idea in NumPy: hashed words and pairs of words, one linear layer, softmax. A model may look
at what it kept again (`topic_check`), as in the paper.
"""

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megabagel.curation.draft import Draft
from megabagel.curation.models.seam import Models, Question
from megabagel.curation.repeats import Rows
from megabagel.curation.steps import Context, step
from megabagel.errors import UserError
from megabagel.sequence.keys import uniform

FEATURES = 2**12
WORDS = 300
"""Words of a document that are looked at."""
NONE = "none"
EPOCHS, RATE = 20, 0.5
EXAMPLE_TOPICS: Mapping[str, Any] = {
    "tutorial": ["how to", "step", "steps", "click", "tutorial", "you will learn", "install", "follow"],
    "encyclopedia": ["is a", "was a", "born in", "located in", "century", "known as", "species"],
    "design": ["design", "layout", "colour", "color", "interior", "architecture", "pattern", "style"],
}
"""Keyword rules; the paper selects tutorials, encyclopaedic pages and design."""


def features(text: str) -> list[int]:
    """Sorted distinct places of the hashed words and pairs of words of a text's beginning."""
    words = re.findall(r"\w+", text.lower())[:WORDS]
    grams = [*words, *(f"{one} {two}" for one, two in pairwise(words))]
    return sorted({zlib.crc32(gram.encode()) % FEATURES for gram in grams})


def label_by_rules(text: str, topics: Mapping[str, Sequence[str]]) -> str:
    """The topic most of whose keywords occur, "none" without any."""
    padded = " " + " ".join(re.findall(r"\w+", text.lower())[:WORDS]) + " "
    hits = {topic: sum(f" {word} " in padded for word in words) for topic, words in topics.items()}
    best = max(hits, key=lambda topic: hits[topic], default=NONE)
    return best if hits.get(best, 0) >= 2 else NONE


def _labelled(
    draft: Draft, models: Models | None, *, topics: Mapping[str, Any], share: float, by: str, **options: Any
) -> list[Any] | None:
    if uniform(0, "topic", draft.key) >= share:
        return None
    known = topics or EXAMPLE_TOPICS
    if by == "rules":
        label = label_by_rules(draft.text, known)
    elif by == "model" and models is not None:
        label = models.ask([topic_question(draft, [*known], WORDS)])[0].strip().strip(".").lower()
    else:
        raise UserError(f"topic.by: {by!r}; expected rules, or model with models.chat in the recipe")
    return [label if label in known else NONE, features(draft.text)]


def topic_question(draft: Draft, topics: Sequence[str], words: int) -> Question:
    """The question which of some topics a document has."""
    return Question("topic", (", ".join(topics), " ".join(draft.text.split()[:words])), max_tokens=8)


def _train(rows: Rows, *, topics: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """For all: the weights of the classifier, as integers of 1 / 1000 so that text and memory stay small."""
    names = [*(topics or EXAMPLE_TOPICS), NONE]
    examples = [(names.index(label), places) for _, documents in rows for _, (label, places) in documents]
    weights = fit(examples, len(names))
    return {"": {"topics": names, "weights": np.rint(weights * 1000).astype(int).tolist()}}


def fit(examples: Sequence[tuple[int, Sequence[int]]], classes: int) -> NDArray[np.float64]:
    """Weights [FEATURES, classes] of a softmax classifier, by stochastic gradient descent in the order given.

    Args:
        examples: (class, places of the features).
        classes: number of classes.
    """
    weights = np.zeros((FEATURES, classes))
    for epoch in range(EPOCHS):
        rate = RATE * (1 - epoch / EPOCHS)
        for label, places in examples:
            if places:
                error = _softmax(weights[places].mean(0))
                error[label] -= 1
                weights[places] -= rate * error
    return weights


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


@step(sketch=_labelled, reduce=_train)
def topic(
    drafts: Iterable[Draft],
    context: Context,
    *,
    keep: Sequence[str] = ("tutorial", "encyclopedia", "design"),
    topics: Mapping[str, Any] = {},
    share: float = 0.2,
    least: float = 0.0,
    by: str = "rules",
) -> Iterator[Draft]:
    """Keep documents of these topics by a classifier trained on a `share` of them that is labelled first.

    Labels come from keyword rules or from a model (`by`). `topics` maps each topic to its keywords (default: three
    examples); a document needs a probability of `least`.
    """
    names: list[str] = context.table.get("topics", [])
    weights = np.array(context.table.get("weights", [])) / 1000
    for draft in drafts:
        places = features(draft.text)
        if not names or not places:
            context.drop(draft, "no topic")
            continue
        chances = _softmax(weights[places].mean(0))
        best = int(chances.argmax())
        if names[best] not in keep or chances[best] < least:
            context.drop(draft, f"topic {names[best]}")
        else:
            yield draft.noted(f"topic: {names[best]} ({chances[best]:.2f})", topic=names[best])


@step
def topic_check(
    drafts: Iterable[Draft],
    context: Context,
    *,
    by: str = "model",
    keep: Sequence[str] = ("tutorial", "encyclopedia", "design"),
    words: int = WORDS,
) -> Iterator[Draft]:
    """Let a model name the topic of what is left, and keep these topics; the second pass of the paper."""
    batch = list(drafts)
    if by != "model" or context.models is None:
        raise UserError(f"topic_check.by: {by!r}; expected model, and models.chat in the recipe")
    questions = [topic_question(draft, keep, words) for draft in batch]
    for draft, answer in zip(batch, context.models.ask(questions), strict=True):
        named = answer.strip().strip(".").lower()
        if named in keep:
            yield draft.noted(f"topic_check: {named}", topic=named)
        else:
            context.drop(draft, "topic by model: none" if named == NONE else "topic by model: another")


def json_in(answer: str) -> Any:
    """The JSON value in a model's answer, None if there is none; a fence of ``` around it is common."""
    found = re.search(r"[\[{].*[\]}]", answer, re.DOTALL)
    try:
        return json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        return None

"""Random selection inside a document: one of several captions, some frames of a clip, a part of a chain of edits.

A visit is one use of a sample in one epoch. Every choice is drawn from a generator keyed by the visit
(`sequence/keys.py`), so it depends neither on the order of visits nor on the number of ranks, and differs between
epochs. A document without alternatives is used whole.
"""

from collections.abc import Iterator
from dataclasses import replace

from megabagel.data.documents import Document, ImageItem, Item, TextItem
from megabagel.sequence.keys import SampleKey

FEWEST_FRAMES, MOST_FRAMES = 8, 12
"""Bounds of the number of frames that a visit uses of a clip with role `look` (docs/bagel.md#data-layouts)."""

Shown = list[tuple[int, Item]]
"""(slot, item) pairs in sequence order; a slot is an index into `document.items`."""


def shown_items(document: Document, key: SampleKey) -> Shown:
    """Select the items of one visit of a document whose roles are assigned."""
    # Most documents have no alternatives; they are returned without any random draw.
    if not any(map(_is_further, document.items)):
        return list(enumerate(document.items))
    if any(isinstance(item, TextItem) and item.joined for item in document.items):
        return _part_of_chain(document, key)
    shown: Shown = []
    for group in _groups(document):
        shown += _choose(group, key)
    return shown


def _is_further(item: Item) -> bool:
    """Return whether an item is an alternative or continuation of the one before: a wording, frame or joined text."""
    return item.alternative or item.joined > 0 if isinstance(item, TextItem) else item.frame


def _groups(document: Document) -> Iterator[Shown]:
    """Split the items into groups: the wordings of one text, the frames of one clip, or a single item."""
    group: Shown = []
    for slot, item in enumerate(document.items):
        if group and not _is_further(item):
            yield group
            group = []
        group.append((slot, item))
    if group:
        yield group


def _choose(group: Shown, key: SampleKey) -> Shown:
    """Pick one wording of a text, a subset of the frames of a `look` clip, and all frames of any other clip."""
    slot, item = group[0]
    if len(group) == 1:
        return group
    if isinstance(item, TextItem):
        return [group[int(key.generator("wording", slot).integers(len(group)))]]
    return [group[frame] for frame in _frames(len(group), slot, key)] if item.role == "look" else group


def _frames(count: int, slot: int, key: SampleKey) -> list[int]:
    """Indices of one random frame from each of 8 to 12 equal intervals; all frames if the clip has fewer."""
    draws = key.generator("frames", slot)
    wanted = min(int(draws.integers(FEWEST_FRAMES, MOST_FRAMES + 1)), count)
    borders = [count * i // wanted for i in range(wanted + 1)]
    return [int(draws.integers(borders[i], borders[i + 1])) for i in range(wanted)]


def _part_of_chain(document: Document, key: SampleKey) -> Shown:
    """Pick one or two steps of a chain of edits, as the released loader does (docs/bagel.md#data-layouts).

    The start is any image but the last, the end one or two images later. Two steps are joined into one instruction with
    probability 0.5; the end then moves back by one if it was the last image.
    """
    images = [slot for slot, item in enumerate(document.items) if isinstance(item, ImageItem)]
    draws = key.generator("chain")
    start = int(draws.integers(len(images) - 1))
    end = int(draws.integers(start + 1, min(start + 3, len(images))))
    joined = 0
    if end - start == 2 and draws.random() < 0.5:
        end = min(end, len(images) - 2)
        joined = end - start

    slots = [images[start]]
    for step, after in [(start, end)] if joined else [(step, step + 1) for step in range(start, end)]:
        between = enumerate(document.items[images[step] : images[step + 1]], images[step])
        wordings = [slot for slot, item in between if isinstance(item, TextItem) and item.joined == joined]
        slots += [wordings[int(draws.integers(len(wordings)))], images[after]]
    (slot, first), *others = [(slot, document.items[slot]) for slot in slots]
    # The task made only the first image of the whole chain a condition; here the part starts at any image.
    return [(slot, replace(first, role="condition")), *others]

"""What one visit of a document shows: which wording of a text, which frames of a clip, which part of a chain of edits.

Every choice is keyed by the visit (`sequence/keys.py`): it does not depend on the order of visits, and another epoch
may choose otherwise. A document without choices is shown whole.
"""

from collections.abc import Iterator
from dataclasses import replace

from megabagel.data.documents import Document, ImageItem, Item, TextItem
from megabagel.sequence.keys import SampleKey

FEWEST_FRAMES, MOST_FRAMES = 8, 12
"""Frames that a visit looks at, of a clip that has as many (docs/bagel.md#data-layouts)."""

Shown = list[tuple[int, Item]]
"""(slot, item) in order; a slot is a place in `document.items`."""


def shown_items(document: Document, key: SampleKey) -> Shown:
    """The items of one visit. The roles of `document` are assigned."""
    if not any(map(_is_further, document.items)):
        return list(enumerate(document.items))
    if any(isinstance(item, TextItem) and item.joined for item in document.items):
        return _part_of_chain(document, key)
    shown: Shown = []
    for group in _groups(document):
        shown += _choose(group, key)
    return shown


def _is_further(item: Item) -> bool:
    """Whether an item stands for the same thing as items before it: another wording, frame or way to say an edit."""
    return item.alternative or item.joined > 0 if isinstance(item, TextItem) else item.frame


def _groups(document: Document) -> Iterator[Shown]:
    """The wordings of one text, the frames of one clip, or a single item."""
    group: Shown = []
    for slot, item in enumerate(document.items):
        if group and not _is_further(item):
            yield group
            group = []
        group.append((slot, item))
    if group:
        yield group


def _choose(group: Shown, key: SampleKey) -> Shown:
    """One of several wordings; some frames of a clip that is looked at, all of one that is generated."""
    slot, item = group[0]
    if len(group) == 1:
        return group
    if isinstance(item, TextItem):
        return [group[int(key.generator("wording", slot).integers(len(group)))]]
    return [group[frame] for frame in _frames(len(group), slot, key)] if item.role == "look" else group


def _frames(count: int, slot: int, key: SampleKey) -> list[int]:
    """One frame, at random, of each of 8 to 12 equal intervals; all frames where there are fewer."""
    draws = key.generator("frames", slot)
    wanted = min(int(draws.integers(FEWEST_FRAMES, MOST_FRAMES + 1)), count)
    borders = [count * i // wanted for i in range(wanted + 1)]
    return [int(draws.integers(borders[i], borders[i + 1])) for i in range(wanted)]


def _part_of_chain(document: Document, key: SampleKey) -> Shown:
    """One or two steps of a chain of edits, as the released loader draws them (docs/bagel.md#data-layouts): any start,
    an end one or two images later; of two steps, half are joined into one, and then end before the last image."""
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
    return [(slot, replace(first, role="condition")), *others]

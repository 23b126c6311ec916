"""Exact checks of what a model made of a `scenes` prompt, edit or question: no weights, no network, no judgement calls.

    judge_picture    a prompt and a picture: right or wrong, and a score per region and for the layout
    judge_edit       an edit, the page before and the picture after: change made, rest kept
    answer_matches   an expected answer and a reply

Scores are in [-1, 1], as SRUM's judges give them (SRUM section 3.1). A region has 1 if all that the prompt names of it
is right, else minus the share that is wrong.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from megabagel.data.builders.scenes_edits import Edit
from megabagel.data.builders.scenes_page import PLACES
from megabagel.data.builders.scenes_text import NUMBERS, Prompt, Requirement
from megabagel.evaluation.shapes_vision import Found, find_figures

MOST_FIGURES = 8
"""Figures of a picture that are matched with what was asked; more are wrong in any case."""
CELLS = 8
"""Cells per side in which pages are compared: their means do not feel the ringing of a codec."""
KEPT_LEVELS = 8.0
"""Largest mean difference (levels of 255) between the cells of a quarter of the page that counts as kept.

Measured on 300 pages of 64 pixels. To be kept: block codec at most 0.8, noise of 20 levels 2.7, blur of 2 pixels 7.9.
Not to be kept: a figure moved by 2 pixels 4.4 to 18, by 4 pixels 7.7 to 36; another shape 5.8 to 54, another colour 12
and more, which both are seen by name as well."""

RELATIONS = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}
LEAST_DISTANCE = 0.1
"""Shares of the page by which centres differ for a relation to hold."""


@dataclass(frozen=True)
class Region:
    """A part of the picture and how well it serves the prompt. `box`: left, top, right, bottom in pixels, half open."""

    name: str
    box: tuple[int, int, int, int]
    score: float
    reason: str


@dataclass(frozen=True)
class Judgement:
    """Whether a picture shows what was asked and nothing else, what is wrong with it, and SRUM's two scores."""

    correct: bool
    faults: tuple[str, ...]
    regions: tuple[Region, ...]
    layout: float


@dataclass(frozen=True)
class _Slot:
    """One asked figure and what stands for it."""

    requirement: Requirement
    index: int
    found: Found | None

    @property
    def named(self) -> dict[str, str]:
        """The attributes that the requirement names."""
        wanted = self.requirement
        values = {"shape": wanted.shape, "colour": wanted.colour, "place": wanted.place}
        return {name: value for name, value in values.items() if value}

    def missing(self) -> list[str]:
        """The named attributes that the found figure lacks."""
        return [name for name, value in self.named.items() if getattr(self.found, name, None) != value]

    def share(self) -> float:
        """Share of the named attributes that are right."""
        return 1 - len(self.missing()) / len(self.named)


def judge_picture(prompt: Prompt, picture: np.ndarray) -> Judgement:
    """Compare an RGB picture, uint8 [height, width, 3], with the prompt.

    Figures are matched with what was asked such that as much as possible is right. Every figure is a region; so is the
    quarter of the page of a figure that is missing from a named place.
    """
    found = find_figures(picture)
    slots = _matched(prompt, found)
    complete = all(slot.found for slot in slots)
    wrong_relations = _wrong_relations(slots) if complete else set()  # a figure is not wrong because another is missing
    faults: list[str] = []
    regions: list[Region] = []
    for slot in slots:
        lacks = slot.missing() + (["position"] if slot.index in wrong_relations else [])
        if lacks:
            faults.append(f"{_one(slot.requirement)}: " + (f"found {slot.found}" if slot.found else "missing"))
        place = slot.requirement.place
        if slot.found or place:
            box = slot.found.box if slot.found else _quarter(place or "", picture.shape)
            named = len(slot.named) + ("position" in lacks)
            score = -len(lacks) / named if lacks else 1.0
            reason = f"wrong: {', '.join(lacks)}" if lacks else "as asked"
            regions.append(Region(str(slot.found or _one(slot.requirement)), box, score, reason))
    matched = {id(slot.found) for slot in slots}
    for figure in found:
        if id(figure) not in matched:
            faults.append(f"not asked for: {figure}")
            regions.append(Region(str(figure), figure.box, -1.0, "not asked for"))
    return Judgement(not faults, tuple(faults), tuple(regions), _layout(slots, len(found), wrong_relations))


def _one(requirement: Requirement) -> str:
    return " ".join(filter(None, (requirement.colour, requirement.shape)))


def _matched(prompt: Prompt, found: Sequence[Found]) -> list[_Slot]:
    """Every asked figure with the found one that stands for it, best in sum; None where nothing of it is there."""
    wanted = [(r, index) for index, r in enumerate(prompt.include) for _ in range(r.count)]
    candidates = [*sorted(found, key=lambda figure: -figure.overlap)[:MOST_FIGURES], *[None] * len(wanted)]
    table = [[_Slot(*pair, figure) for figure in candidates] for pair in wanted]
    shares = [[slot.share() for slot in row] for row in table]
    related = any(requirement.position for requirement in prompt.include)

    def worth(chosen: tuple[int, ...]) -> tuple[int, float]:
        right = [row[number] for row, number in zip(shares, chosen, strict=True)]
        wrong = _wrong_relations([row[number] for row, number in zip(table, chosen, strict=True)]) if related else ()
        return right.count(1) - len(wrong), sum(right)

    best = max(permutations(range(len(candidates)), len(wanted)), key=worth)
    slots = [row[number] for row, number in zip(table, best, strict=True)]
    return [slot if slot.share() > 0 else _Slot(slot.requirement, slot.index, None) for slot in slots]


def _wrong_relations(slots: Sequence[_Slot]) -> set[int]:
    """Indices of both requirements of every relation that does not hold."""
    figure = {slot.index: slot.found for slot in slots}
    wrong: set[int] = set()
    for slot in slots:
        if slot.requirement.position:
            relation, other = slot.requirement.position
            a, b = slot.found, figure[other]
            if a is None or b is None or RELATIONS[relation](a, b) < LEAST_DISTANCE:
                wrong |= {slot.index, other}
    return wrong


def _layout(slots: Sequence[_Slot], found: int, wrong_relations: set[int]) -> float:
    """Arrangement alone: the number of figures, named places that hold a figure, relations; from -1 to 1."""
    places = {slot.found.place for slot in slots if slot.found}
    conditions = [found == len(slots)]
    conditions += [slot.requirement.place in places for slot in slots if slot.requirement.place]
    complete = all(slot.found for slot in slots)
    conditions += [complete and slot.index not in wrong_relations for slot in slots if slot.requirement.position]
    return 2 * sum(conditions) / len(conditions) - 1


def _cells(picture: np.ndarray) -> np.ndarray:
    """Mean colours [CELLS, CELLS, 3] of the cells of a picture."""
    return np.asarray(Image.fromarray(picture).resize((CELLS, CELLS), Image.Resampling.BOX), dtype=np.float64)


def _quarter(place: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The box of a place."""
    height, width = shape[:2]
    x, y = PLACES[place]
    left, top = (width // 2 if x > 0.5 else 0), (height // 2 if y > 0.5 else 0)
    return left, top, left + width // 2, top + height // 2


@dataclass(frozen=True)
class EditJudgement:
    """The two sides of an edit (what GEdit calls semantic consistency and what is called preservation)."""

    made: bool
    kept: bool
    faults: tuple[str, ...]

    @property
    def correct(self) -> bool:
        """The change is made and the rest is kept."""
        return self.made and self.kept


def judge_edit(edit: Edit, before: np.ndarray, after: np.ndarray) -> EditJudgement:
    """Compare a picture with what the edit should have made of the page.

    Args:
        edit: the scenes before and after.
        before: the page that was to be edited, RGB uint8 [height, width, 3].
        after: what was made of it, of the same size.

    Returns:
        made: at every place of the edit there is what should be, and no figure lies between places.
        kept: at every other place there is the same figure, and its cells differ by at most KEPT_LEVELS on average.
    """
    assert before.shape == after.shape, (before.shape, after.shape)
    found = find_figures(after)
    difference = np.abs(_cells(after) - _cells(before))
    unmade = [f"not asked for: {figure}" for figure in found if figure.place is None]
    lost: list[str] = []
    for place in PLACES:
        expected = edit.after.at(place)
        there = [figure.kind for figure in found if figure.place == place]
        left, top, right, bottom = _quarter(place, difference.shape)
        levels = difference[top:bottom, left:right].mean()
        faults = unmade if place in edit.places else lost
        if there != ([expected.kind] if expected else []):
            faults.append(f"at the {place}: {' and '.join(f'{c} {s}' for c, s in there) or 'nothing'}")
        elif place not in edit.places and levels > KEPT_LEVELS:
            lost.append(f"at the {place}: differs by {levels:.1f} levels")
    return EditJudgement(not unmade, not lost, (*unmade, *lost))


_NUMBERS = {str(number): word for number, word in enumerate(NUMBERS)} | {"none": "zero", "no": "no"}
_FILLERS = {"a", "an", "the", "at", "in", "it", "is", "there", "are", "on"}


def answer_matches(expected: str, reply: str) -> bool:
    """Whether a reply equals the expected answer, without further content, after normalisation.

    Thoughts in <think> tags, case, punctuation, articles and other fillers do not count, digits are read as words. To
    a yes/no question the first word decides, as in MME.
    """
    said, wanted = _words(reply), _words(expected)
    return said[:1] == wanted if wanted in (["yes"], ["no"]) else said == wanted


def _words(text: str) -> list[str]:
    text = re.sub(r"<think>.*?</think>", " ", text.lower(), flags=re.DOTALL)
    words = re.findall(r"[a-z]+|\d+", text)
    return [_NUMBERS.get(word, word) for word in words if word not in _FILLERS]

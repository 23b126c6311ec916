"""Texts about scenes: captions, prompts of the six GenEval tags, questions, and the rule of held-out combinations.

A prompt is a list of requirements, with the fields of GenEval's metadata; its wording follows from them. `tag` names
the ability that it tests:

    single_object   a circle at the top left                    colors       a red circle
    two_object      a circle at the top left and a square ...   counting     three red circles
    position        a red circle left of a blue square          color_attr   a red circle and a blue square
    scene           every figure with its place (any number of figures; not a tag of GenEval)

One prompt in `HELD_OUT_SHARE` is held out for evaluation, chosen by a hash of tag and requirements, and so is every
scene that a held-out prompt describes completely. Thus no training image shows and no caption names the combination of
a held-out prompt, while each of its words occurs in other prompts. The rule is a pure function of the prompt, without
seed or file, so it is the same for every data set.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from megabagel.data.builders.scenes_page import COLOURS, PLACES, SHAPES, Figure, Scene, pick
from megabagel.sequence.keys import uniform

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
HELD_OUT_SHARE = 6
NUMBERS = ("zero", "one", "two", "three", "four")
INVERSE = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}


@dataclass(frozen=True)
class Requirement:
    """`count` figures with the attributes that are not None; `position` is (relation, index of another requirement)."""

    shape: str
    count: int = 1
    colour: str | None = None
    place: str | None = None
    position: tuple[str, int] | None = None

    def __str__(self) -> str:
        noun = " ".join(filter(None, (self.colour, self.shape)))
        words = f"a {noun}" if self.count == 1 else f"{NUMBERS[self.count]} {noun}s"
        return f"{words} at the {self.place}" if self.place else words


@dataclass(frozen=True)
class Prompt:
    """A text-to-image prompt: a picture must show the required figures and no others."""

    tag: str
    include: tuple[Requirement, ...]

    @property
    def text(self) -> str:
        """The wording: "a red circle left of a blue square"."""
        *before, last = map(str, self.include)
        if relation := self.include[0].position:
            return f"{before[0]} {relation[0]} {last}"
        return f"{', '.join(before)} and {last}" if before else last

    @property
    def held_out(self) -> bool:
        """Whether the prompt is held out for evaluation."""
        include = self.include
        # Two wordings of the same relation (left of, right of) must give the same answer.
        if include[0].position and include[0].position[0] in ("right of", "below"):
            include = _turned(self).include
        parts = [f"{r.count}:{r.colour}:{r.shape}:{r.place}:{r.position}" for r in include]
        return (
            uniform("held out", self.tag, "|".join(parts if include[0].position else sorted(parts)))
            < 1 / HELD_OUT_SHARE
        )

    def to_json(self) -> dict[str, Any]:
        """Tag, requirements and wording as JSON values."""
        include = [{**asdict(r), "position": r.position and list(r.position)} for r in self.include]
        return {"tag": self.tag, "prompt": self.text, "include": include}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Prompt":
        """The prompt that `to_json` wrote."""
        include = [{**r, "position": r["position"] and tuple(r["position"])} for r in value["include"]]
        return cls(value["tag"], tuple(Requirement(**r) for r in include))


def _turned(prompt: Prompt) -> Prompt:
    """The inverse wording of a position prompt: "a blue square right of a red circle"."""
    first, second = prompt.include
    assert first.position
    turned = Requirement(second.shape, 1, second.colour, position=(INVERSE[first.position[0]], 1))
    return Prompt("position", (turned, Requirement(first.shape, 1, first.colour)))


def full_prompt(scene: Scene) -> Prompt:
    """The prompt that names every figure and its place."""
    return Prompt("scene", tuple(Requirement(f.shape, 1, f.colour, f.place) for f in scene.figures))


def prompts(scene: Scene) -> list[Prompt]:
    """Every prompt that describes the whole scene, `full_prompt` first."""
    return [full_prompt(scene), *_tagged(scene.figures)]


def _tagged(figures: tuple[Figure, ...]) -> Iterator[Prompt]:
    first, *others = figures
    kinds = {figure.kind for figure in figures}
    if not others:
        yield Prompt("single_object", (Requirement(first.shape, place=first.place),))
        yield Prompt("colors", (Requirement(first.shape, colour=first.colour),))
    elif len(kinds) == 1:
        yield Prompt("counting", (Requirement(first.shape, len(figures), first.colour),))
    if len(figures) == 2:
        yield Prompt("two_object", tuple(Requirement(f.shape, place=f.place) for f in figures))
    if len(figures) == len(kinds) == 2:
        second = others[0]
        yield Prompt("color_attr", tuple(Requirement(f.shape, colour=f.colour) for f in figures))
        (row, column), (other_row, other_column) = first.place.split(), second.place.split()
        if row == other_row or column == other_column:
            relation = "left of" if row == other_row else "above"
            requirement = Requirement(first.shape, colour=first.colour, position=(relation, 1))
            prompt = Prompt("position", (requirement, Requirement(second.shape, colour=second.colour)))
            yield from (prompt, _turned(prompt))


def held_out(scene: Scene) -> bool:
    """Return whether a scene is held out for evaluation, because some prompt that describes it is."""
    return any(prompt.held_out for prompt in prompts(scene))


@dataclass(frozen=True)
class Question:
    """A question about a page and its answer; both questions of a yes/no pair carry the kind `yes/no`."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of each kind that the scene allows (what, colour, where, how many), then a yes/no pair.

    The pair asks about a figure that is on the page, and about one that is not and differs from it in colour or shape.
    """
    place = pick(rng, scene.figures).place if rng.random() < 0.7 else pick(rng, PLACES)
    there = scene.at(place)
    asked = [Question("what", f"what is at the {place}?", f"a {' '.join(there.kind)}" if there else "nothing")]
    if lone := [f for f in scene.figures if sum(f.shape == other.shape for other in scene.figures) == 1]:
        figure = pick(rng, lone)
        asked.append(Question("colour", f"which colour is the {figure.shape}?", figure.colour))
    if single := [f for f in scene.figures if sum(f.kind == other.kind for other in scene.figures) == 1]:
        figure = pick(rng, single)
        asked.append(Question("where", f"where is the {' '.join(figure.kind)}?", f"at the {figure.place}"))
    asked.append(_how_many(scene, rng))
    figure = pick(rng, scene.figures)
    kinds = {figure.kind for figure in scene.figures}
    near = [(colour, figure.shape) for colour in COLOURS] + [(figure.colour, shape) for shape in SHAPES]
    absent = pick(rng, [kind for kind in near if kind not in kinds])
    pair = [Question("yes/no", f"is there a {' '.join(figure.kind)}?", "yes")]
    pair.insert(int(rng.integers(2)), Question("yes/no", f"is there a {' '.join(absent)}?", "no"))
    return asked + pair


def _how_many(scene: Scene, rng: np.random.Generator) -> Question:
    noun = pick(rng, ("figure", *SHAPES))
    count = sum(noun in ("figure", figure.shape) for figure in scene.figures)
    return Question("how many", f"how many {noun}s are there?", NUMBERS[count])


def mention(scene: Scene, figure: Figure, rng: np.random.Generator) -> str:
    """A noun phrase that identifies a figure of the scene: by shape, or by colour and shape, if that is unambiguous;
    else by its place."""
    same_shape = sum(figure.shape == other.shape for other in scene.figures)
    same_kind = sum(figure.kind == other.kind for other in scene.figures)
    ways = [f"the figure at the {figure.place}"]
    if same_kind == 1:
        ways.append(f"the {' '.join(figure.kind)}")
    if same_shape == 1:
        ways.append(f"the {figure.shape}")
    return ways[-1] if len(ways) == 1 else pick(rng, ways[1:])


def all_prompts(tag: str) -> list[Prompt]:
    """All prompts of a GenEval tag that describe some scene, each wording once, in a fixed order."""
    found: dict[Prompt, None] = {}
    for scene in _scenes_of(tag):
        found |= dict.fromkeys(prompt for prompt in prompts(scene) if prompt.tag == tag)
    return list(found)


def _scenes_of(tag: str) -> Iterator[Scene]:
    """Scenes that together cover all prompts of a tag."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    if tag in ("single_object", "colors"):
        yield from (Scene((Figure(*kind, place),)) for kind in kinds for place in PLACES)
    elif tag == "counting":
        yield from (
            Scene(tuple(Figure(*kind, place) for place in list(PLACES)[:count]))
            for kind in kinds
            for count in (2, 3, 4)
        )
    else:
        for first, second in combinations(PLACES, 2):
            yield from (Scene((Figure(*kind, first), Figure(*other, second))) for kind in kinds for other in kinds)

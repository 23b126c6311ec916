"""Random edits of scenes: an instruction, the pages before and after, and for some a thought that explains the edit.

    one figure    recolour, reshape, move, remove, add: one figure changes, all others keep their pixels
    two_step      two of these in one instruction
    conceptual    the instruction describes things instead of naming them ("the figure with three corners", "the colour
                  of the sky"), or refers to another figure; the thought names them

`Edit.places` are the places whose pixels may change; all other pixels are unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megabagel.data.builders.scenes_page import COLOURS, SHAPES, Figure, Scene, pick, random_figure
from megabagel.data.builders.scenes_text import mention

CONCEPTS = {"circle": "without corners", "square": "with four corners", "triangle": "with three corners"}
THINGS = {
    "red": "ripe strawberries",
    "green": "grass",
    "blue": "the sky",
    "yellow": "lemons",
    "purple": "lavender",
    "black": "coal",
}
"""By colour: a thing of this colour."""


@dataclass(frozen=True)
class Edit:
    """One edit. `kind` is a name of the table above; `thought` is empty for edits that need no explanation."""

    kind: str
    instruction: str
    before: Scene
    after: Scene
    thought: str = ""

    @property
    def places(self) -> frozenset[str]:
        """Places at which the pages differ."""
        changed = set(self.before.figures) ^ set(self.after.figures)
        return frozenset(figure.place for figure in changed)


def recolour(scene: Scene, rng: np.random.Generator) -> Edit:
    """Change the colour of one figure."""
    figure = pick(rng, scene.figures)
    colour = pick(rng, COLOURS, but=figure.colour)
    changed = scene.without(figure).having(replace(figure, colour=colour))
    return Edit("recolour", f"make {mention(scene, figure, rng)} {colour}", scene, changed)


def reshape(scene: Scene, rng: np.random.Generator) -> Edit:
    """Change the shape of one figure."""
    figure = pick(rng, scene.figures)
    shape = pick(rng, SHAPES, but=figure.shape)
    changed = scene.without(figure).having(replace(figure, shape=shape))
    return Edit("reshape", f"turn {mention(scene, figure, rng)} into a {shape}", scene, changed)


def move(scene: Scene, rng: np.random.Generator) -> Edit:
    """Move one figure to a free place."""
    figure, place = pick(rng, scene.figures), pick(rng, scene.free)
    changed = scene.without(figure).having(replace(figure, place=place))
    return Edit("move", f"move {mention(scene, figure, rng)} to the {place}", scene, changed)


def remove(scene: Scene, rng: np.random.Generator) -> Edit:
    """Remove one figure; for scenes with more than one."""
    figure = pick(rng, scene.figures)
    return Edit("remove", f"remove {mention(scene, figure, rng)}", scene, scene.without(figure))


def add(scene: Scene, rng: np.random.Generator) -> Edit:
    """Add a figure at a free place."""
    figure = random_figure(rng, scene.free)
    instruction = f"add a {figure.colour} {figure.shape} at the {figure.place}"
    return Edit("add", instruction, scene, scene.having(figure))


def simple_edit(scene: Scene, rng: np.random.Generator) -> Edit:
    """A random edit of one figure; each kind that the scene allows is equally likely."""
    kinds: list[Callable[[Scene, np.random.Generator], Edit]] = [recolour, reshape]
    kinds += [move, add] if scene.free else []
    kinds += [remove] if len(scene.figures) > 1 else []
    return pick(rng, kinds)(scene, rng)


def two_step(scene: Scene, rng: np.random.Generator) -> Edit:
    """Two consecutive edits in one instruction; the second refers to the page after the first."""
    while True:
        first = simple_edit(scene, rng)
        second = simple_edit(first.after, rng)
        # With a place in common the second edit could undo or change the result of the first.
        if not first.places & second.places:
            instruction = f"{first.instruction}, then {second.instruction}"
            return Edit("two_step", instruction, scene, second.after)


def conceptual(scene: Scene, rng: np.random.Generator) -> Edit:
    """A random edit whose instruction describes its objects; the thought gives the edit in plain terms."""
    kinds = [_paint_like, _paint_described]
    if len({figure.shape for figure in scene.figures}) > 1:
        kinds.append(_remove_described)
    if len({figure.colour for figure in scene.figures}) > 1:
        kinds.append(_match_colours)
    return pick(rng, kinds)(scene, rng)


def _paint(scene: Scene, chosen: list[Figure], colour: str) -> Scene:
    return Scene.of(replace(figure, colour=colour) if figure in chosen else figure for figure in scene.figures)


def _paint_like(scene: Scene, rng: np.random.Generator) -> Edit:
    """ "make the circle the colour of the sky"."""
    figure = pick(rng, scene.figures)
    colour = pick(rng, COLOURS, but=figure.colour)
    named = mention(scene, figure, rng)
    return Edit(
        "conceptual",
        f"give {named} the colour of {THINGS[colour]}",
        scene,
        _paint(scene, [figure], colour),
        f"the colour of {THINGS[colour]} is {colour}: make {named} {colour}",
    )


def _paint_described(scene: Scene, rng: np.random.Generator) -> Edit:
    """ "paint every figure without corners blue"."""
    shape = pick(rng, scene.figures).shape
    chosen = [figure for figure in scene.figures if figure.shape == shape]
    colour = pick(rng, [colour for colour in COLOURS if any(figure.colour != colour for figure in chosen)])
    return Edit(
        "conceptual",
        f"paint every figure {CONCEPTS[shape]} {colour}",
        scene,
        _paint(scene, chosen, colour),
        f"figures {CONCEPTS[shape]} are {shape}s: {_listed(chosen)}",
    )


def _remove_described(scene: Scene, rng: np.random.Generator) -> Edit:
    """ "remove every figure with three corners"; figures of another shape stay."""
    shape = pick(rng, scene.figures).shape
    chosen = [figure for figure in scene.figures if figure.shape == shape]
    return Edit(
        "conceptual",
        f"remove every figure {CONCEPTS[shape]}",
        scene,
        Scene(tuple(figure for figure in scene.figures if figure not in chosen)),
        f"figures {CONCEPTS[shape]} are {shape}s: {_listed(chosen)}",
    )


def _match_colours(scene: Scene, rng: np.random.Generator) -> Edit:
    """ "give the circle the colour of the figure at the top left"."""
    figure = pick(rng, scene.figures)
    other = pick(rng, [other for other in scene.figures if other.colour != figure.colour])
    named = mention(scene, figure, rng)
    return Edit(
        "conceptual",
        f"give {named} the colour of the figure at the {other.place}",
        scene,
        _paint(scene, [figure], other.colour),
        f"the figure at the {other.place} is {other.colour}: make {named} {other.colour}",
    )


def _listed(figures: list[Figure]) -> str:
    return " and ".join(f"the one at the {figure.place}" for figure in figures)


def riddle(scene: Scene) -> tuple[str, str]:
    """A prompt that describes every figure without naming its shape or colour, and the thought that names them."""
    asked = [
        f"a figure {CONCEPTS[f.shape]} in the colour of {THINGS[f.colour]} at the {f.place}" for f in scene.figures
    ]
    meant = [f"a {f.colour} {f.shape} at the {f.place}" for f in scene.figures]
    return " and ".join(asked), " and ".join(meant)

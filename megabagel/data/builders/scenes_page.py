"""Pages of one to four coloured figures: their description as plain data, and their rendering.

`Scene` is the only description of a page: the builder renders it and writes texts about it, and the checker
(`megabagel/evaluation/shapes_checker.py`) compares the figures that it detects in a picture with it. Colours are exact:
every pixel inside a figure is a value of `COLOURS`, every pixel outside is `PAPER`, with one smoothed pixel between.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 180),
    "black": (40, 40, 40),
}
PAPER = (235, 235, 230)
SHAPES = ("circle", "square", "triangle")
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
"""Centre (x, y) of each place in shares of the page, in reading order. A place holds at most one figure."""

JITTER = 0.02
"""Largest offset of a figure from the centre of its place, in shares of the page."""
RADII = (0.155, 0.185)
"""Smallest and largest half side of a figure's bounding box, in shares of the page. Neighbours stay 0.09 of the page
(6 of 64 pixels) apart, so that even a blurred picture has a gap of paper between them."""

SMOOTHING = 4
"""Pages are drawn this many times larger and averaged down, which smooths edges."""

Option = TypeVar("Option")


@dataclass(frozen=True)
class Figure:
    """One figure: colour, shape and place, and its offset in the place and radius in shares of the page."""

    colour: str
    shape: str
    place: str
    dx: float = 0.0
    dy: float = 0.0
    radius: float = 0.17

    @property
    def kind(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box: left, top, right, bottom in shares of the page."""
        x, y = PLACES[self.place]
        x, y, r = x + self.dx, y + self.dy, self.radius
        return x - r, y - r, x + r, y + r


@dataclass(frozen=True)
class Scene:
    """The figures of a page, in the order of `PLACES`."""

    figures: tuple[Figure, ...]

    @classmethod
    def of(cls, figures: Iterable[Figure]) -> "Scene":
        """The scene of figures given in any order; at most one per place."""
        order = sorted(figures, key=lambda figure: list(PLACES).index(figure.place))
        assert len({figure.place for figure in order}) == len(order), order
        return cls(tuple(order))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Scene":
        """The scene that `to_json` wrote."""
        return cls.of(Figure(**figure) for figure in value["figures"])

    def to_json(self) -> dict[str, Any]:
        """The scene as JSON values."""
        return {"figures": [asdict(figure) for figure in self.figures]}

    def at(self, place: str) -> Figure | None:
        """The figure in a place."""
        return next((figure for figure in self.figures if figure.place == place), None)

    @property
    def free(self) -> tuple[str, ...]:
        """Places without a figure."""
        return tuple(place for place in PLACES if self.at(place) is None)

    def without(self, figure: Figure) -> "Scene":
        """The scene without a figure."""
        return Scene(tuple(other for other in self.figures if other != figure))

    def having(self, figure: Figure) -> "Scene":
        """The scene with a further figure."""
        return Scene.of([*self.figures, figure])


def pick(rng: np.random.Generator, options: Iterable[Option], but: Option | None = None) -> Option:
    """A random option other than `but`."""
    left = [option for option in options if option != but]
    return left[rng.integers(len(left))]


def random_figure(rng: np.random.Generator, places: Sequence[str] = tuple(PLACES)) -> Figure:
    """A random figure in one of `places`."""
    dx, dy = rng.uniform(-JITTER, JITTER, 2)
    radius = rng.uniform(*RADII)
    return Figure(pick(rng, COLOURS), pick(rng, SHAPES), pick(rng, places), float(dx), float(dy), float(radius))


def render(scene: Scene, size: int) -> Image.Image:
    """Render a page as an RGB image of `size` x `size` pixels.

    Pixels away from a figure do not depend on it, so figures that an edit does not change keep their pixels bit for
    bit.
    """
    side = size * SMOOTHING
    page = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(page)
    for figure in scene.figures:
        left, top, right, bottom = (share * side for share in figure.box)
        colour = COLOURS[figure.colour]
        if figure.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=colour)
        elif figure.shape == "square":
            pen.rectangle((left, top, right, bottom), fill=colour)
        else:
            pen.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=colour)
    return page.reduce(SMOOTHING)

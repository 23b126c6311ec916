"""Coloured shapes on a page: description, caption and rendering, for the data set `shapes`."""

import io
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 180),
}
SHAPES = ("circle", "square", "triangle")
PLACES = {"left": 0.28, "middle": 0.5, "right": 0.72}
"""Centre of a shape, as a share of the page's width."""

PAPER = (235, 235, 230)
SMOOTHING = 4
"""Pages are drawn this many times larger and averaged down, which smooths edges."""


@dataclass(frozen=True)
class Figure:
    """One shape on a page; `x`, `y` are its centre in shares of the page, `radius` in shares of its shorter side."""

    colour: str
    shape: str
    place: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} {'in' if self.place == 'middle' else 'on'} the {self.place}"

    def moved(self, place: str, share: float = 1.0) -> "Figure":
        """The figure moved to another place, or by `share` of the way to it."""
        return replace(self, place=place, x=self.x + share * (PLACES[place] - PLACES[self.place]))


def pick(rng: np.random.Generator, options: Collection[str], but: str | None = None) -> str:
    """A random option other than `but`."""
    left = [option for option in options if option != but]
    return left[rng.integers(len(left))]


def random_figure(rng: np.random.Generator) -> Figure:
    """A random figure near one of the three places, completely on the page."""
    place = pick(rng, PLACES)
    x = PLACES[place] + rng.uniform(-0.04, 0.04)
    return Figure(pick(rng, COLOURS), pick(rng, SHAPES), place, x, rng.uniform(0.4, 0.6), rng.uniform(0.17, 0.23))


def draw(figure: Figure, width: int, height: int) -> Image.Image:
    """Render a figure on a page of `width` x `height` pixels."""
    page = Image.new("RGB", (width * SMOOTHING, height * SMOOTHING), PAPER)
    x, y, radius = figure.x * page.width, figure.y * page.height, figure.radius * min(page.size)
    box = (x - radius, y - radius, x + radius, y + radius)
    pen, colour = ImageDraw.Draw(page), COLOURS[figure.colour]
    if figure.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif figure.shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    return page.reduce(SMOOTHING)


def encode(page: Image.Image, extension: str) -> bytes:
    """Encode a page as `jpg` or `png`."""
    buffer = io.BytesIO()
    page.save(buffer, "JPEG" if extension == "jpg" else "PNG", quality=95)
    return buffer.getvalue()

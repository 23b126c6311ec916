"""Find the figures of a picture of the `scenes` world: colour, shape, place, box. Exact rules, no weights.

A pixel of a smoothed edge mixes paper and one colour, so it is nearest to the *line* from paper to that colour, and its
place on the line is the share of the pixel that the figure covers. A figure is a connected set of pixels that are at
least half covered. (Nearest single colours would call the grey edge of a black figure purple.) The shape is the ideal
shape of equal area and centre of mass that overlaps best with the figure; unlike the share of the bounding box that is
filled (circle 0.785, triangle 0.5), this does not depend on the few pixels at the tips, which blur takes away.

Suffixes: HW pixels, K colours, N figures.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megabagel.data.builders.scenes_page import COLOURS, PAPER, PLACES, SHAPES

LONGEST_SIDE = 128
"""Larger pictures are averaged down to this: finer detail decides nothing here."""
SMALLEST_SHARE = 0.008
"""Components below this share of the page are specks, not figures. The smallest triangle of the data covers 0.048."""
BEST_OVERLAP = 0.75
"""Least intersection over union with an ideal shape; below, the shape is None. Rendered figures reach 0.9 or more."""
FARTHEST_COLOUR = 75.0
"""Largest distance (of RGB levels) of a figure's mean colour from its name's; beyond, the colour is None."""
BETWEEN_PLACES = 0.1
"""A figure whose centre is nearer than this (share of the page) to a middle line is at no place."""


@dataclass(frozen=True)
class Found:
    """One figure of a picture. `box` is left, top, right, bottom in pixels of the picture, half open; `x`, `y` are the
    centre of mass in shares of the page; `overlap` is the intersection over union with the ideal shape."""

    colour: str | None
    shape: str | None
    place: str | None
    box: tuple[int, int, int, int]
    x: float
    y: float
    overlap: float

    @property
    def kind(self) -> tuple[str | None, str | None]:
        """Colour and shape."""
        return self.colour, self.shape

    def __str__(self) -> str:
        return f"{self.colour or 'unknown'} {self.shape or 'figure'} at {self.place or 'no place'}"


def find_figures(picture: np.ndarray) -> list[Found]:
    """The figures of an RGB picture, uint8 [height, width, 3], in reading order of their centres' rows and columns."""
    height, width = picture.shape[:2]
    pixels_hw3 = _smooth(_reduced(picture))
    label_hw, cover_hw = _nearest_lines(pixels_hw3)
    found = []
    for mask_hw in _figures(label_hw, cover_hw >= 0.5):
        colour = _colour(pixels_hw3, mask_hw)
        shape, overlap = _shape(mask_hw)
        x, y = _centre(mask_hw)
        rows, columns = np.nonzero(mask_hw)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        scale = (width / mask_hw.shape[1], height / mask_hw.shape[0])
        left, top, right, bottom = (round(float(edge) * scale[n % 2]) for n, edge in enumerate(box))
        found.append(Found(colour, shape, _place(x, y), (left, top, right, bottom), x, y, overlap))
    return sorted(found, key=lambda figure: (figure.y > 0.5, figure.x))


def _reduced(picture: np.ndarray) -> np.ndarray:
    """The picture with sides of at most LONGEST_SIDE, float64."""
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3, (picture.dtype, picture.shape)
    factor = -(-max(picture.shape[:2]) // LONGEST_SIDE)
    return np.asarray(Image.fromarray(picture).reduce(factor) if factor > 1 else picture, dtype=np.float64)


def _smooth(pixels_hw3: np.ndarray) -> np.ndarray:
    """Weights 1 2 1 along both axes: less noise, and straight edges stay half covered where they were."""
    for axis in (0, 1):
        padding = [(1, 1) if other == axis else (0, 0) for other in range(3)]
        padded = np.pad(pixels_hw3, padding, mode="edge")
        before, middle, after = (np.take(padded, range(n, n + pixels_hw3.shape[axis]), axis) for n in range(3))
        pixels_hw3 = (before + 2 * middle + after) / 4
    return pixels_hw3


def _nearest_lines(pixels_hw3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel the colour whose line from the paper is nearest, and where on it the pixel lies (0 paper, 1 colour)."""
    paper_3 = np.array(PAPER, dtype=np.float64)
    lines = np.array(list(COLOURS.values())) - paper_3
    offset_hw3 = pixels_hw3 - paper_3
    cover_by_colour = np.clip(offset_hw3 @ lines.T / (lines**2).sum(axis=1), 0, 1)
    distance_by_colour = np.linalg.norm(offset_hw3[..., None, :] - cover_by_colour[..., None] * lines, axis=-1)
    label_hw = distance_by_colour.argmin(axis=-1)
    return label_hw, np.take_along_axis(cover_by_colour, label_hw[..., None], axis=-1)[..., 0]


def _figures(label_hw: np.ndarray, covered_hw: np.ndarray) -> list[np.ndarray]:
    """Masks of the figures: connected components, cut where they have several colours of a figure's size."""
    smallest = SMALLEST_SHARE * label_hw.size
    masks: list[np.ndarray] = []
    for whole_hw in _components(covered_hw):
        if whole_hw.sum() < smallest:
            continue
        labels, counts = np.unique(label_hw[whole_hw], return_counts=True)
        parts = [whole_hw & (label_hw == label) for label in labels[counts >= smallest]]
        parts = [part_hw for part_hw in parts if _eroded(part_hw).sum() >= smallest]
        masks += parts if len(parts) > 1 else [whole_hw]
    return masks


def _components(mask_hw: np.ndarray) -> list[np.ndarray]:
    """The sets of pixels of the mask that touch by their sides: runs of each row, joined with those above them."""
    padded = np.pad(mask_hw.astype(np.int8), ((0, 0), (1, 1)))
    rows, starts = np.nonzero(np.diff(padded, axis=1) == 1)
    ends = np.nonzero(np.diff(padded, axis=1) == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    root = list(range(len(runs)))

    def find(run: int) -> int:
        while root[run] != run:
            root[run] = run = root[root[run]]
        return run

    above = 0
    for number, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1:
            above += 1
        for other in range(above, number):
            if runs[other][0] == row - 1 and runs[other][1] < end and start < runs[other][2]:
                root[find(other)] = find(number)
    masks: dict[int, np.ndarray] = {}
    for number, (row, start, end) in enumerate(runs):
        masks.setdefault(find(number), np.zeros(mask_hw.shape, bool))[row, start:end] = True
    return list(masks.values())


def _eroded(mask_hw: np.ndarray) -> np.ndarray:
    """The mask without its outermost pixels."""
    padded = np.pad(mask_hw, 1)
    return mask_hw & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _colour(pixels_hw3: np.ndarray, mask_hw: np.ndarray) -> str | None:
    """The name nearest to the median of the figure's inside."""
    inside = _eroded(_eroded(mask_hw))
    median_3 = np.median(pixels_hw3[inside if inside.any() else mask_hw], axis=0)
    distances = {name: float(np.linalg.norm(median_3 - levels)) for name, levels in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= FARTHEST_COLOUR else None


def _centre(mask_hw: np.ndarray) -> tuple[float, float]:
    """Centre of mass (x, y) in shares of the page."""
    rows, columns = np.nonzero(mask_hw)
    return float(columns.mean() + 0.5) / mask_hw.shape[1], float(rows.mean() + 0.5) / mask_hw.shape[0]


def _shape(mask_hw: np.ndarray) -> tuple[str | None, float]:
    """The shape whose ideal of equal area and centre overlaps most with the mask, and the overlap."""
    rows, columns = np.nonzero(mask_hw)
    y, x, area = rows.mean(), columns.mean(), len(rows)
    down_hw, across_hw = np.ogrid[: mask_hw.shape[0], : mask_hw.shape[1]]
    down_hw, across_hw = down_hw - y, across_hw - x
    half = np.sqrt(area / 2)  # of a triangle: its box is 2 half wide and high, its centre of mass two thirds down
    below_apex_hw = down_hw + 4 / 3 * half
    ideal = {
        "circle": down_hw**2 + across_hw**2 <= area / np.pi,
        "square": np.maximum(abs(down_hw), abs(across_hw)) <= np.sqrt(area) / 2,
        "triangle": (below_apex_hw >= 2 * abs(across_hw)) & (below_apex_hw <= 2 * half),
    }
    overlaps = {name: (mask_hw & ideal[name]).sum() / (mask_hw | ideal[name]).sum() for name in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return (best if overlaps[best] >= BEST_OVERLAP else None), float(overlaps[best])


def _place(x: float, y: float) -> str | None:
    """The place whose quarter of the page the point is in, away from the middle lines."""
    if min(abs(x - 0.5), abs(y - 0.5)) < BETWEEN_PLACES:
        return None
    return min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)

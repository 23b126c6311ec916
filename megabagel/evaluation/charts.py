"""Line and bar charts as PNG and tables as Markdown, by Pillow and plain text: no plotting library is needed."""

import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 80, 230, 36, 52
"""Margins around the axes, pixels; the legend is in the right one."""
COLOURS = ("#1f4e9c", "#c23b22", "#2e8540", "#8a4fbf", "#c98500", "#0f8b8d", "#7a5230", "#555555")
TICKS = 5

Curve = Sequence[tuple[float, float]]
"""Points (x, y) in order of x."""


def line_chart(curves: Mapping[str, Curve], title: str, x: str, y: str) -> bytes:
    """Draw curves as a PNG file.

    Args:
        curves: points by the name that the legend shows.
        title: above the axes.
        x: label of the horizontal axis.
        y: label of the vertical axis.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    points = [point for curve in curves.values() for point in curve if all(map(math.isfinite, point))]
    across, up = (_range([point[axis] for point in points]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        right = LEFT + (point[0] - across[0]) / (across[1] - across[0]) * (WIDTH - LEFT - RIGHT)
        return right, HEIGHT - BOTTOM - (point[1] - up[0]) / (up[1] - up[0]) * (HEIGHT - TOP - BOTTOM)

    for tick in range(TICKS + 1):
        value_x, value_y = (low + (high - low) * tick / TICKS for low, high in (across, up))
        px, py = place((value_x, value_y))
        draw.line([(LEFT, py), (WIDTH - RIGHT, py)], "#dddddd")
        draw.text((LEFT - 6, py), _number(value_y), "black", font, anchor="rm")
        draw.text((px, HEIGHT - BOTTOM + 6), _number(value_x), "black", font, anchor="mt")
    draw.rectangle([LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], outline="black")
    draw.text((LEFT, 10), title, "black", ImageFont.load_default(size=15))
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22), x, "black", font, anchor="mt")
    draw.text((LEFT - 70, TOP - 18), y, "black", font)
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [place(point) for point in curve if all(map(math.isfinite, point))]
        if len(placed) > 1:
            draw.line(placed, colour, 2)
        for px, py in placed:
            draw.ellipse([px - 3, py - 3, px + 3, py + 3], colour)
        row = TOP + 8 + 20 * number
        draw.line([(WIDTH - RIGHT + 14, row), (WIDTH - RIGHT + 38, row)], colour, 3)
        draw.text((WIDTH - RIGHT + 44, row), name[:26], "black", font, anchor="lm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def bar_chart(groups: Mapping[str, Mapping[str, float]], title: str, y: str) -> bytes:
    """Draw bars, side by side within named groups, as a PNG file.

    Args:
        groups: value by the name that the legend shows, by the group's name below the axis; the same names in each.
        title: above the axes.
        y: label of the vertical axis.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    values = [value for group in groups.values() for value in group.values() if math.isfinite(value)]
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0) or 1.0
    height = HEIGHT - TOP - BOTTOM

    def level(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * height

    for tick in range(TICKS + 1):
        value = low + (high - low) * tick / TICKS
        draw.line([(LEFT, level(value)), (WIDTH - RIGHT, level(value))], "#dddddd")
        draw.text((LEFT - 6, level(value)), _number(value), "black", font, anchor="rm")
    span = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    bar = 0.8 * span / max(1, len(names))
    for place, (title_of, group) in enumerate(groups.items()):
        for number, name in enumerate(names):
            value, left = group.get(name, math.nan), LEFT + span * (place + 0.1) + bar * number
            if math.isfinite(value):
                top, bottom = sorted((level(value), level(0.0)))
                draw.rectangle([left, top, left + bar - 2, bottom], COLOURS[number % len(COLOURS)])
        draw.multiline_text(
            (LEFT + span * (place + 0.5), HEIGHT - BOTTOM + 6), title_of.replace("/", "\n"), "black", font, "ma"
        )
    for number, name in enumerate(names):
        row = TOP + 8 + 20 * number
        draw.line([(WIDTH - RIGHT + 14, row), (WIDTH - RIGHT + 38, row)], COLOURS[number % len(COLOURS)], 6)
        draw.text((WIDTH - RIGHT + 44, row), name[:26], "black", font, anchor="lm")
    draw.text((LEFT, 10), title, "black", ImageFont.load_default(size=15))
    draw.text((LEFT - 70, TOP - 18), y, "black", font)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis: the values with a margin of 5 %, never empty."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _number(value: float) -> str:
    """A short number for an axis: 1.2M, 35k, 0.42."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; `|` in cells is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)

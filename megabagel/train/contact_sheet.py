"""Sample images on one sheet, each with its prompt beneath."""

import io
import math
import textwrap
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 160
"""Small pictures are enlarged by a whole factor to about this width, so that a person can see them; pixels."""
GAP = 8
LINE = 14
LETTER = 7
"""Width that a letter of the caption may take, pixels."""


def contact_sheet(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint8 [height, width, 3] of every picture (uint8 [h, w, 3], at least one), in rows from the top left."""
    cells = [_cell(prompt, picture) for prompt, picture in pictures.items()]
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    width, height = (max(cell.size[axis] for cell in cells) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (GAP + index % columns * width, GAP + index // columns * height))
    return np.asarray(sheet)


def png(picture: np.ndarray) -> bytes:
    """The PNG file of a uint8 [height, width, 3] picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _cell(prompt: str, picture: np.ndarray) -> Image.Image:
    """The picture, its prompt, and the gap to the right and below."""
    scale = max(1, round(CELL / picture.shape[1]))
    image = Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1))
    lines = textwrap.wrap(prompt, max(1, image.width // LETTER))
    cell = Image.new("RGB", (image.width + GAP, image.height + LINE * len(lines) + 2 * GAP), "white")
    cell.paste(image)
    for number, line in enumerate(lines):
        ImageDraw.Draw(cell).text((0, image.height + 2 + LINE * number), line, "black", ImageFont.load_default(size=12))
    return cell

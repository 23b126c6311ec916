"""Contact sheet: sample images on one picture, each with its prompt beneath."""

import io
import math
import textwrap
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 160
"""Target width of a cell in pixels: smaller pictures are enlarged by a whole factor to about this width."""
GAP = 8
"""Margin around a cell, pixels."""
LINE = 14
"""Height of a caption line, pixels."""
LETTER = 7
"""Width reserved for a letter of the caption, pixels."""


def contact_sheet(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Arrange pictures in rows on one sheet.

    Args:
        pictures: prompt -> uint8 [height, width, 3]; at least one.

    Returns:
        uint8 [height, width, 3].
    """
    cells = [_cell(prompt, picture) for prompt, picture in pictures.items()]
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    width, height = (max(cell.size[axis] for cell in cells) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (GAP + index % columns * width, GAP + index // columns * height))
    return np.asarray(sheet)


def png(picture: np.ndarray) -> bytes:
    """Encode a uint8 [height, width, 3] picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _cell(prompt: str, picture: np.ndarray) -> Image.Image:
    """Return the picture with its prompt beneath and a gap to the right and below."""
    scale = max(1, round(CELL / picture.shape[1]))
    image = Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1))
    lines = textwrap.wrap(prompt, max(1, image.width // LETTER))
    cell = Image.new("RGB", (image.width + GAP, image.height + LINE * len(lines) + 2 * GAP), "white")
    cell.paste(image)
    for number, line in enumerate(lines):
        ImageDraw.Draw(cell).text((0, image.height + 2 + LINE * number), line, "black", ImageFont.load_default(size=12))
    return cell

"""Picture of the attention mask: a row per query, a column per key, in the colour of the key's segment."""

import numpy as np
from PIL import Image, ImageDraw

from megabagel.data.inspect.view import Kind, SampleView

Colour = tuple[int, int, int]

COLOURS: dict[Kind, Colour] = {
    Kind.READ: (122, 139, 163),
    Kind.LEARNED: (37, 99, 205),
    Kind.SEEN: (26, 150, 84),
    Kind.CLEAN: (232, 152, 18),
    Kind.NOISED: (205, 45, 116),
}
LOSS: Colour = (32, 34, 40)
HIDDEN: Colour = (250, 250, 248)
BORDER: Colour = (255, 255, 255)
RULER, GAP = 14, 4
"""Width of the strips beside the mask, and distance between them, in pixels."""


def draw_mask(view: SampleView, side: int) -> Image.Image:
    """Draw the mask with at most `side` pixels per side, and rulers beside it.

    Strips above and on the left show the segment of every column and row; the outer strip on the left is dark for rows
    with loss. If there are more tokens than pixels, pixels are averages.
    """
    colour_S = np.array([COLOURS[kind] for kind in view.kinds()], np.float32)
    scale = max(1, side // len(colour_S))
    pixels = min(side, len(colour_S) * scale)
    edges = np.arange(pixels + 1) * len(colour_S) // pixels
    mask = Image.fromarray(thumbnail(view, colour_S, edges))
    loss_S = (view.pack.ce_S | view.pack.noised_S).astype(np.float32)[:, None]
    losses = np.array(HIDDEN) * (1 - loss_S) + np.array(LOSS) * loss_S
    margin = 2 * (RULER + GAP)
    page = Image.new("RGB", (margin + pixels, margin + pixels), "white")
    page.paste(mask, (margin, margin))
    page.paste(_strip(colour_S, edges).resize((RULER, pixels)), (RULER + GAP, margin))
    page.paste(_strip(losses, edges).resize((RULER, pixels)), (0, margin))
    page.paste(
        _strip(colour_S, edges).transpose(Image.Transpose.TRANSPOSE).resize((pixels, RULER)), (margin, RULER + GAP)
    )
    _borders(page, [segment.rows.start * pixels / len(colour_S) for segment in view.segments[1:]], margin)
    return page


def thumbnail(view: SampleView, colour_S: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Average the mask over blocks of queries and keys.

    Args:
        view: the sample.
        colour_S: colour of every token, float32 [tokens, 3].
        edges: n + 1 ascending token indices. Pixel (i, j) covers queries edges[i] to edges[i + 1] and keys edges[j] to
            edges[j + 1]; an empty range takes the token at its start.

    Returns:
        uint8 [n, n, 3]: mean colour of the pairs of each pixel; a masked pair has the colour HIDDEN.
    """
    # One row of pixels at a time, with a running sum over the keys: the full mask of a long sample is never held.
    codes, paint_S = view.pack.codes, colour_S - np.array(HIDDEN)
    first, last = edges[:-1], np.maximum(edges[1:], edges[:-1] + 1)
    keys_before = np.zeros((len(colour_S) + 1, 3))
    picture = np.empty((len(first), len(first), 3), np.uint8)
    for row, (start, stop) in enumerate(zip(first, last, strict=True)):
        a0, a1, b0, b1 = (bound[start:stop, None] for bound in codes.of_queries)
        sees = ((a0 <= codes.key_code) & (codes.key_code < a1)) | ((b0 <= codes.key_code) & (codes.key_code < b1))
        np.cumsum(sees.mean(0)[:, None] * paint_S, 0, out=keys_before[1:])
        mean = (keys_before[last] - keys_before[first]) / (last - first)[:, None]
        picture[row] = np.rint(mean + HIDDEN)
    return picture


def _strip(colour_S: np.ndarray, edges: np.ndarray) -> Image.Image:
    """Column of pixels, one wide: the colour of the token at each edge."""
    return Image.fromarray(colour_S[edges[:-1], None].astype(np.uint8))


def _borders(page: Image.Image, places: list[float], margin: int) -> None:
    """Draw white lines between segments."""
    pen = ImageDraw.Draw(page)
    for place in places:
        at = margin + round(place)
        pen.line([(RULER + GAP, at), (page.width, at)], BORDER)
        pen.line([(at, RULER + GAP), (at, page.height)], BORDER)

"""Clarity, perceptual hash and text density of grey levels."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megabagel.curation.measure.look import shrunk

Grey = NDArray[np.uint8]


def clarity(grey: Grey, side: int = 0) -> float:
    """Variance of the Laplacian: small where an image is blurred or empty.

    Args:
        grey: levels 0 to 255 [height, width].
        side: shrink to this longest side first, so that pictures of different sizes compare; 0: as it is.
    """
    if side:
        grey = np.asarray(shrunk(Image.fromarray(grey), side))
    if min(grey.shape) < 3:
        return 0.0
    levels = grey.astype(np.float32)
    neighbours = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:]
    return float((neighbours - 4 * levels[1:-1, 1:-1]).var())


def difference_hash(grey: Grey) -> int:
    """64-bit dHash: one bit per pair of neighbours in a row of the image at 9 x 8 pixels; near images differ in few."""
    small = np.asarray(Image.fromarray(grey).resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits((small[:, 1:] > small[:, :-1]).ravel()).tobytes(), "big")


BLOCK = 16
"""Side of a block of text_density in pixels: one to three letters of body text."""
CONTRAST = 48
"""Least distance of ink from paper in levels."""


def text_density(grey: Grey) -> float:
    """Share of 16 x 16 blocks that look like print: strokes of ink on even paper, crossed several times by a row.

    Stands in for an OCR word count where Tesseract is absent. Photographs have no even paper, and drawings cross a row
    once or twice, where three letters cross it four times or more.
    """
    rows, columns = (length // BLOCK for length in grey.shape)
    if not rows or not columns:
        return 0.0
    levels = grey[: rows * BLOCK, : columns * BLOCK].astype(np.int16)
    # [rows, columns, BLOCK, BLOCK]
    blocks = levels.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)
    paper = np.median(blocks, axis=(2, 3), keepdims=True)
    ink = np.abs(blocks - paper) > CONTRAST
    even = (np.abs(blocks - paper) < CONTRAST // 4).mean((2, 3)) > 0.4
    share = ink.mean((2, 3))
    crossings = (ink[..., 1:] != ink[..., :-1]).sum(3)
    with_ink = ink.any(3)
    # Mean over the rows that have ink: half of a block may be the gap between two lines.
    mean = (crossings * with_ink).sum(2) / np.maximum(with_ink.sum(2), 1)
    return float((even & (share > 0.04) & (share < 0.6) & (mean >= 2.5)).mean())


def near_groups(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Label hashes so that any two within `bits` of each other, directly or over others, have the same label.

    Args:
        hashes: [N] 64-bit hashes.
        bits: most differing bits, 0 to 7. Compared are hashes that agree in one of `bits + 1` bands, which two hashes
            with at most `bits` differences always do.

    Returns:
        [N] labels: the lowest position of each group.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    parent = np.arange(len(unique))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = int(parent[place])
        return place

    edges = [64 * band // (bits + 1) for band in range(bits + 2)] if bits else []
    for low, high in pairwise(edges):
        band = (unique >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        cuts = np.flatnonzero(np.diff(band[order])) + 1
        for group in np.split(order, cuts):
            for number, one in enumerate(group[:-1]):
                others = group[number + 1 :]
                for other in others[_popcount(unique[others] ^ unique[one]) <= bits]:
                    parent[root(int(other))] = root(int(one))
    roots = np.array([root(place) for place in range(len(unique))], dtype=np.int64)
    lowest = np.full(len(unique), len(hashes), dtype=np.int64)
    np.minimum.at(lowest, roots, first)
    return lowest[roots[inverse.reshape(-1)]]


def _popcount(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(1, dtype=np.int64)

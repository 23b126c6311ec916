"""Image transforms before the model: conversion to 8-bit RGB, orientation, and the target size of resizing."""

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from megabagel.config.schema import ResizeConfig
from megabagel.data.exif import ORIENTATION, orientation_of


@lru_cache(2**14)
def resize_target(width: int, height: int, rule: ResizeConfig, stride: int, images: int = 1) -> tuple[int, int]:
    """Target size of an image by the resize rule of docs/bagel.md#image-sizes.

    Args:
        width: width of the image in pixels.
        height: height of the image in pixels.
        rule: bounds of the sides and of the area.
        stride: pixels per token; both sides become multiples of it.
        images: images of the sample that share `rule.max_pixels`.

    Returns:
        Width and height in pixels.
    """

    def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
        return _multiple(round(width * scale), stride), _multiple(round(height * scale), stride)

    shrink = min(rule.max_size / max(width, height), 1.0)
    width, height = scaled(width, height, max(shrink, rule.min_size / min(width, height)))
    max_pixels = rule.max_pixels / images
    # As released: sides are scaled by the ratio of areas, not by its square root, so the area ends below `max_pixels`.
    if width * height > max_pixels:
        width, height = scaled(width, height, max_pixels / (width * height))
    if max(width, height) > rule.max_size:
        width, height = scaled(width, height, rule.max_size / max(width, height))
    return width, height


def _multiple(side: int, stride: int) -> int:
    return max(stride, round(side / stride) * stride)


_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF 6
WHITE_IS_ZERO = 0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image of an EXIF orientation upright."""


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image; 1 (upright) if it has none or its EXIF cannot be read."""
    try:
        turn = image.getexif().get(ORIENTATION)
    except MemoryError:
        raise
    # Pillow raises errors of many types on malformed EXIF, which must not cost the picture.
    except Exception:
        turn = None
    if turn is None and isinstance(block := image.info.get("exif"), bytes):
        turn = orientation_of(block)
    return int(turn) if isinstance(turn, int) and turn in _TURNS else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert the first frame of an image to 8-bit RGB: upright by EXIF, transparency on white.

    Grey of more than 8 bits (PNG, TIFF, PGM, JPEG 2000) is scaled to 8 bits by the range that its file declares, not
    clipped.

    Raises:
        ValueError: a pixel format without a defined range (floating point, signed) or without a conversion to RGB.
        OSError, SyntaxError and others: Pillow, when the data is damaged.
    """
    image.seek(0)
    # Before `load`, which discards the bit depth of the file.
    depth = _png_depth(image)
    image.load()
    # Not ImageOps.exif_transpose: it rewrites all EXIF tags, and a single malformed tag lost an intact photo.
    turn = _TURNS.get(orientation(image))
    # `is not None`, because FLIP_LEFT_RIGHT is 0.
    if turn is not None:
        image = _transposed(image, turn)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        return _from_deep_grey(image)
    if depth and "transparency" in image.info and image.mode in ("1", "L", "RGB"):
        image.info["transparency"] = _at_8_bits(image.info["transparency"], depth)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        # Viewers ignore the alpha of a BMP if it is 0 everywhere; the picture would be all white otherwise.
        if image.format == "BMP" and layer.getchannel("A").getextrema() == (0, 0):
            return layer.convert("RGB")
        page = Image.new("RGB", layer.size, "white")
        page.paste(layer, mask=layer.getchannel("A"))
        return page
    return image.convert("RGB")


def _transposed(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    """Transpose an image and keep its format and TIFF tags, which Pillow drops and later steps need."""
    turned = image.transpose(turn)
    turned.format = image.format
    if hasattr(image, "tag_v2"):
        turned.tag_v2 = image.tag_v2  # type: ignore[attr-defined]
    return turned


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits to RGB; the level that a PNG declares transparent becomes white."""
    levels = np.asarray(image).astype(np.float64)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0]
    if 2 in tags.get(_SAMPLE_FORMAT, ()) or (levels < 0).any():
        raise ValueError("signed pixels have no defined range")
    shown = np.rint(levels * (255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == WHITE_IS_ZERO:
        shown = 255 - shown
    if isinstance(clear := image.info.get("transparency"), int):
        shown[levels == clear] = 255
    return Image.fromarray(shown).convert("RGB")


def _png_depth(image: Image.Image) -> int:
    """Bits per sample of a PNG whose pixels Pillow converts to 8 bits, or 0 if there is no conversion."""
    # From the arguments of Pillow's decoder: the mode of the image is already that of the converted pixels.
    tiles = getattr(image, "tile", None) if image.format == "PNG" else None
    mode = str(tiles[0][3][0] if isinstance(tiles[0][3], tuple) else tiles[0][3]) if tiles else ""
    if mode == "1":
        return 1
    return {"L;2": 2, "L;4": 4, "RGB;16B": 16}.get(mode, 0)


def _at_8_bits(clear: Any, depth: int) -> Any:
    """Convert the transparent level or levels of a PNG of another bit depth to the 8-bit levels of Pillow's pixels."""
    if isinstance(clear, tuple):
        return tuple(_at_8_bits(level, depth) for level in clear)
    if not isinstance(clear, int):
        return clear
    return clear >> 8 if depth == 16 else min(clear * (255 // (2**depth - 1)), 255)

"""Pixels before the model: what an image file means in RGB, and which size it is brought to."""

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from megabagel.config.schema import ResizeConfig
from megabagel.data.exif import ORIENTATION, orientation_of


@lru_cache(2**14)
def resize_target(width: int, height: int, rule: ResizeConfig, stride: int, images: int = 1) -> tuple[int, int]:
    """Width and height, multiples of `stride`, that an image of `width` x `height` pixels is resized to.

    The rule of docs/bagel.md#image-sizes, bit for bit: rounding is half to even, the scale that enforces
    `rule.max_pixels / images` is the ratio of areas and not its root, and `max_size` is enforced once more at the end.
    """

    def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
        return _multiple(round(width * scale), stride), _multiple(round(height * scale), stride)

    shrink = min(rule.max_size / max(width, height), 1.0)
    width, height = scaled(width, height, max(shrink, rule.min_size / min(width, height)))
    max_pixels = rule.max_pixels / images
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
"""What brings an image of an EXIF orientation upright."""


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where the file names none or its EXIF cannot be understood."""
    try:
        turn = image.getexif().get(ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # Pillow raises what it likes on odd EXIF, which is not the picture
        turn = None
    if turn is None and isinstance(block := image.info.get("exif"), bytes):
        turn = orientation_of(block)
    return int(turn) if isinstance(turn, int) and turn in _TURNS else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """The first frame as a viewer shows it, in 8-bit RGB: turned as EXIF says, transparency on white.

    Grey of more than 8 bits (PNG, TIFF, PGM, JPEG 2000) is scaled to 8 bits by the range that its file declares, not
    clipped. Of EXIF nothing but the orientation is looked at: ImageOps.exif_transpose writes all of it anew, and one
    odd tag lost a sound photo.

    Raises:
        ValueError: a pixel format without a defined range (floating point, signed) or without a conversion to RGB.
        OSError, SyntaxError and others: Pillow, when the data is damaged.
    """
    image.seek(0)
    depth = _png_depth(image)  # known before pixels are decoded only
    image.load()
    turn = _TURNS.get(orientation(image))
    if turn is not None:  # FLIP_LEFT_RIGHT is 0
        image = _transposed(image, turn)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        return _from_deep_grey(image)
    if depth and "transparency" in image.info and image.mode in ("1", "L", "RGB"):
        image.info["transparency"] = _at_8_bits(image.info["transparency"], depth)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if image.format == "BMP" and layer.getchannel("A").getextrema() == (0, 0):
            return layer.convert("RGB")  # viewers take an alpha that is 0 everywhere for none
        page = Image.new("RGB", layer.size, "white")
        page.paste(layer, mask=layer.getchannel("A"))
        return page
    return image.convert("RGB")


def _transposed(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    """The image turned, still known by its format and tags."""
    turned = image.transpose(turn)
    turned.format = image.format
    if hasattr(image, "tag_v2"):
        turned.tag_v2 = image.tag_v2  # type: ignore[attr-defined]
    return turned


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits in RGB; the level that a PNG declares transparent becomes white."""
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
    """Bits per sample of a PNG whose pixels Pillow brings to 8 bits, 0 where they have 8 already."""
    tiles = getattr(image, "tile", None) if image.format == "PNG" else None
    mode = str(tiles[0][3][0] if isinstance(tiles[0][3], tuple) else tiles[0][3]) if tiles else ""
    if mode == "1":
        return 1
    return {"L;2": 2, "L;4": 4, "RGB;16B": 16}.get(mode, 0)


def _at_8_bits(clear: Any, depth: int) -> Any:
    """The level, or levels, that a PNG of other depth declares transparent, as Pillow has its pixels."""
    if isinstance(clear, tuple):
        return tuple(_at_8_bits(level, depth) for level in clear)
    if not isinstance(clear, int):
        return clear
    return clear >> 8 if depth == 16 else min(clear * (255 // (2**depth - 1)), 255)

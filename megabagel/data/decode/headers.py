"""What a file says about its image before any pixel is decoded, and which files are refused for that."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from PIL import Image, UnidentifiedImageError

from megabagel.data.decode import png, tiff
from megabagel.data.decode.contract import DecodeError
from megabagel.data.decode.transforms import orientation, to_rgb

__all__ = ["MAX_ASPECT", "MAX_PIXELS", "damage_is_named", "decode", "measure", "open_image", "orientation"]

MAX_PIXELS = 2**26
"""An image with more pixels (8192 x 8192) is refused before its pixels are decoded: 200 kB of PNG can hold more than a
hundred million, and every one takes up to 12 bytes on its way to RGB."""
MAX_ASPECT = 200
"""Longest over shortest side; beyond it an image is a line."""

# Pillow's own limit warns at one size and raises at twice that size; ours is the only one, in open_image.
Image.MAX_IMAGE_PIXELS = None

Image.init()
# No others: Pillow would start Ghostscript for PostScript under another name.
_FORMATS = sorted({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys())
_TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width


def measure(blob: bytes, *, verify: bool) -> tuple[int, int]:
    """Height and width of an image as it is shown, EXIF orientation applied.

    With `verify` the image is fully decoded, so that no engine can fail on it later. Without, only the header is read
    (all of a PNG, whose orientation may stand at the end).

    Raises:
        DecodeError: the bytes are not a usable image.
    """
    if verify:
        width, height = decode(blob).size
    else:
        image = open_image(blob)
        with damage_is_named():
            width, height = image.size[::-1] if orientation(image) in _TRANSPOSED else image.size
    return height, width


def decode(blob: bytes) -> Image.Image:
    """The image in 8-bit RGB, as `to_rgb` has it; large ones take turns, so that threads do not add up their memory.

    A PNG that Pillow refuses is tried once more without its side chunks: a bad or huge text, profile or time is no
    damage of the pixels, and libpng reads over it.

    Raises:
        DecodeError: the bytes are not a usable image.
    """
    try:
        return _decode(blob)
    except DecodeError:
        if (bare := png.pixels_alone(blob)) is None:
            raise
        return _decode(bare)


def _decode(blob: bytes) -> Image.Image:
    image = _open(blob)
    with damage_is_named(), _LARGE if image.width * image.height > LARGE_PIXELS else nullcontext():
        return to_rgb(image)


LARGE_PIXELS = 2**24
_LARGE = threading.Lock()


def open_image(blob: bytes) -> Image.Image:
    """The image with its header read and its pixels undecoded.

    Raises:
        DecodeError: no image in a format that is read here, or one beyond MAX_PIXELS or MAX_ASPECT.
    """
    try:
        return _open(blob)
    except DecodeError:
        if (bare := png.pixels_alone(blob)) is None:
            raise
        return _open(bare)


def _open(blob: bytes) -> Image.Image:
    if not blob:
        raise DecodeError("zero bytes")
    with damage_is_named():
        image = Image.open(io.BytesIO(tiff.readable(blob)), formats=_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DecodeError("too many pixels", f"{width} x {height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DecodeError("extreme aspect", f"{width} x {height}")
    return image


@contextmanager
def damage_is_named() -> Iterator[None]:
    """Turn whatever Pillow raises on damaged data into a DecodeError."""
    try:
        yield
    except MemoryError:  # says nothing about the file
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("not an image") from error
    except Exception as error:  # Pillow's decoders raise what they like: OSError, SyntaxError, struct.error, ...
        raise DecodeError("damaged image", str(error)) from error

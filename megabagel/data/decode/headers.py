"""Image headers: sizes, limits and opening of image files, before pixels are decoded."""

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
"""Most pixels of an image (8192 x 8192), enforced before decoding: 200 kB of PNG can hold more than a hundred million
pixels, and each takes up to 12 bytes during conversion to RGB."""
MAX_ASPECT = 200
"""Largest ratio of the longer to the shorter side."""

# Pillow's own limit is switched off: it warns at one size and raises at twice that size. Ours is checked in `_open`.
Image.MAX_IMAGE_PIXELS = None

Image.init()
# An explicit list: Pillow detects formats by content, and would run Ghostscript on PostScript with any file name.
_FORMATS = sorted({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys())
_TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width


def measure(blob: bytes, *, verify: bool) -> tuple[int, int]:
    """Height and width of an image in pixels after its EXIF orientation is applied.

    Args:
        blob: bytes of the image file.
        verify: decode the whole image, so that it cannot fail in training. Otherwise only the header is read (all of a
            PNG, whose orientation may come after the pixels).

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
    """Decode an image to 8-bit RGB (see `to_rgb`).

    A PNG that Pillow refuses is tried again without its ancillary chunks: a bad or huge text, profile or time does not
    damage the pixels, and libpng ignores it.

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
    # Large images are decoded one at a time, so that threads don't add up their memory.
    with damage_is_named(), _LARGE if image.width * image.height > LARGE_PIXELS else nullcontext():
        return to_rgb(image)


LARGE_PIXELS = 2**24
_LARGE = threading.Lock()


def open_image(blob: bytes) -> Image.Image:
    """Open an image: read its header without decoding pixels.

    Raises:
        DecodeError: not an image of a supported format, or beyond MAX_PIXELS or MAX_ASPECT.
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
    """Context manager that turns any error of Pillow on damaged data into a DecodeError."""
    try:
        yield
    # Lack of memory is no property of the file, and must not be recorded in the index as one.
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("not an image") from error
    # Not narrower: Pillow's decoders raise OSError, SyntaxError, struct.error and others.
    except Exception as error:
        raise DecodeError("damaged image", str(error)) from error

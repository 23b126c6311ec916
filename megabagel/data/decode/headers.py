"""What a file says about its image before any pixel is decoded, and which files are refused for that."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from megabagel.data.decode.contract import DecodeError
from megabagel.data.decode.transforms import to_rgb

MAX_PIXELS = 2**27
"""An image with more pixels (11585 x 11585) is refused before its pixels are decoded."""
MAX_ASPECT = 200
"""Longest over shortest side; beyond it an image is a line."""

# Pillow's own limit warns at one size and raises at twice that size; ours is the only one, in open_image.
Image.MAX_IMAGE_PIXELS = None

Image.init()
# No others: Pillow would start Ghostscript for PostScript under another name.
_FORMATS = sorted({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys())
_TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width
_ORIENTATION = 0x0112


def measure(blob: bytes, *, verify: bool) -> tuple[int, int]:
    """Height and width of an image as it is shown, EXIF orientation applied.

    With `verify` the image is fully decoded, so that no engine can fail on it later. Without, only the header is read
    (all of a PNG, whose orientation may stand at the end).

    Raises:
        DecodeError: the bytes are not a usable image.
    """
    image = open_image(blob)
    with damage_is_named():
        if verify:
            width, height = to_rgb(image).size
        else:
            width, height = image.size[::-1] if orientation(image) in _TRANSPOSED else image.size
    return height, width


def open_image(blob: bytes) -> Image.Image:
    """The image with its header read and its pixels undecoded.

    Raises:
        DecodeError: no image in a format that is read here, or one beyond MAX_PIXELS or MAX_ASPECT.
    """
    if not blob:
        raise DecodeError("zero bytes")
    with damage_is_named():
        image = Image.open(io.BytesIO(blob), formats=_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DecodeError("too many pixels", f"{width} x {height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DecodeError("extreme aspect", f"{width} x {height}")
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where the file names none."""
    return image.getexif().get(_ORIENTATION, 1)


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

"""Decode engines: a pure function from the bytes of an image file to the pixel tensors that the model wants.

An engine takes one file and the sizes of its views (say, one for the VAE and one for the ViT), decodes once and resizes
once per view. It holds no state, so there is nothing to checkpoint and any image can be asked for at any time.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError

from megabagel.data.documents import SampleError
from megabagel.data.transforms import to_rgb

logger = logging.getLogger(__name__)

DecodeEngine = Callable[[bytes, Sequence[tuple[int, int]]], list[torch.Tensor]]
"""(file, [(height, width), ...]) -> one float32 tensor [3, height, width] in [-1, 1] per size."""

MAX_PIXELS = 2**27
"""An image with more pixels (11585 x 11585) is refused before its pixels are decoded."""
MAX_ASPECT = 200
"""Longest over shortest side; beyond it an image is a line."""

# Pillow's own limit warns at one size and raises at twice that size; ours is the only one, in _open.
Image.MAX_IMAGE_PIXELS = None

Image.init()
# No others: Pillow would start Ghostscript for PostScript under another name.
_FORMATS = sorted({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys())
_TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width
_ORIENTATION = 0x0112


class DecodeError(SampleError):
    """The bytes are not an image that can be used."""


def choose_engine(name: Literal["auto", "host"]) -> DecodeEngine:
    """The engine for `data.decode`, with a line in the log that says which and why."""
    why = "the only engine of this build" if name == "auto" else "data.decode asks for it"
    logger.info("decode engine: host (Pillow %s; %s)", PIL.__version__, why)
    return decode


def decode(blob: bytes, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Engine `host`: Pillow on the CPU, bicubic with antialiasing (bagel-reference section 14).

    Args:
        blob: the bytes of an image file.
        sizes: (height, width) of every view.

    Returns:
        One float32 tensor [3, height, width] in [-1, 1] per size.

    Raises:
        DecodeError: the bytes are not a usable image.
    """
    image = _open(blob)
    with _damage_is_named():
        image = to_rgb(image)
    return [_pixels(image.resize((width, height), Image.Resampling.BICUBIC)) for height, width in sizes]


def measure(blob: bytes, *, verify: bool) -> tuple[int, int]:
    """Height and width of an image as it is shown, EXIF orientation applied.

    With `verify` the image is fully decoded, so that `decode` cannot fail on it later. Without, only the header is read
    (all of a PNG, whose orientation may stand at the end).

    Raises:
        DecodeError: the bytes are not a usable image.
    """
    image = _open(blob)
    with _damage_is_named():
        if verify:
            width, height = to_rgb(image).size
        else:
            width, height = image.size[::-1] if image.getexif().get(_ORIENTATION) in _TRANSPOSED else image.size
    return height, width


def _open(blob: bytes) -> Image.Image:
    """Read the header; pixels stay undecoded."""
    if not blob:
        raise DecodeError("zero bytes")
    with _damage_is_named():
        image = Image.open(io.BytesIO(blob), formats=_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DecodeError("too many pixels", f"{width} x {height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DecodeError("extreme aspect", f"{width} x {height}")
    return image


@contextmanager
def _damage_is_named() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        raise DecodeError("not an image") from error
    except Exception as error:  # Pillow's decoders raise what they like: OSError, SyntaxError, struct.error, ...
        raise DecodeError("damaged image", str(error)) from error


def _pixels(image: Image.Image) -> torch.Tensor:
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return levels.float().div_(255).sub_(0.5).div_(0.5)

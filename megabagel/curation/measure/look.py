"""Size and grey levels of an image file, decoded once for all steps that look at it."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megabagel.data.decode.headers import decode

SIDE = 1024
"""Longest side of the grey levels: small print can still be told from noise, and one picture takes at most 1 MiB."""
KEPT = 16
"""Pictures in the cache: about one document. Unbounded, a worker would end up with its whole partition in memory."""


@dataclass(frozen=True)
class Look:
    """An image as the measures see it."""

    height: int
    width: int
    grey: NDArray[np.uint8]
    """Grey levels, shrunk so that the longest side is at most SIDE."""


_looks: OrderedDict[bytes, Look] = OrderedDict()


def look(data: bytes) -> Look:
    """Decode an image file.

    Raises:
        DecodeError: the bytes are not a usable image.
    """
    # By digest: the bytes as keys would be kept in memory, up to 512 MiB each.
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if digest in _looks:
        _looks.move_to_end(digest)
        return _looks[digest]
    image = decode(data)
    found = Look(image.height, image.width, np.asarray(shrunk(image.convert("L"), SIDE)))
    _looks[digest] = found
    if len(_looks) > KEPT:
        _looks.popitem(last=False)
    return found


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image with its longest side reduced to `side`; smaller ones stay as they are."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BOX)

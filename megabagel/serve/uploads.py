"""Images that clients send: as data URLs or form parts, checked by their headers before they are decoded."""

import base64
import binascii
from collections.abc import Sequence

from PIL import Image

from megabagel.data.decode.contract import DecodeError
from megabagel.data.decode.headers import decode, measure
from megabagel.serve.errors import ApiError
from megabagel.serve.jobs import Upload
from megabagel.serve.limits import Limits


def from_data_url(url: str, place: str) -> bytes:
    """The file in a data URL.

    Other URLs are refused: a server that fetches what clients name can be made to read its own network.

    Args:
        url: `data:image/png;base64,...`.
        place: name of the field, for the message.

    Raises:
        ApiError: it is another URL, or damaged.
    """
    head, comma, data = url.partition(",")
    scheme, _, kind = head.partition(":")
    if scheme.lower() != "data":
        raise ApiError(
            400,
            f"{place}={url[:60]!r}: images are not fetched from elsewhere; expected data:image/png;base64,...",
            "invalid_image_url",
            place,
        )
    if not comma or not kind.lower().startswith("image/") or not kind.lower().endswith(";base64"):
        raise ApiError(400, f"{place}={head[:60]!r}: expected data:image/TYPE;base64,...", "invalid_image_url", place)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{place}: the data URL is not base64 ({error})", "invalid_base64", place) from error


def open_uploads(items: Sequence[str | bytes], limits: Limits) -> tuple[str | Upload, ...]:
    """Decode the images among texts and images, all sizes first.

    Raises:
        ApiError: one cannot be read, or they have too many pixels.
    """
    number, pixels = 0, 0
    for item in items:
        if isinstance(item, bytes):
            number += 1
            pixels += _pixels(item, number)
    if pixels > limits.pixels:
        raise ApiError(
            413, f"input images have {pixels:,} pixels in all: expected at most {limits.pixels:,}", "image_too_large"
        )
    return tuple(item if isinstance(item, str) else Upload(item, _decoded(item)) for item in items)


def _pixels(blob: bytes, number: int) -> int:
    try:
        height, width = measure(blob, verify=False)
    except DecodeError as error:
        raise _unreadable(number, error) from error
    return height * width


def _decoded(blob: bytes) -> Image.Image:
    try:
        return decode(blob)
    except DecodeError as error:
        raise _unreadable(None, error) from error


def _unreadable(number: int | None, error: DecodeError) -> ApiError:
    which = "an input image" if number is None else f"input image {number}"
    return ApiError(400, f"{which}: {error}; expected a PNG, JPEG, WebP or other image (docs/data.md)", "invalid_image")

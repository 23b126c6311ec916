"""Pixels before the model: what an image file means in RGB, and which size it is brought to."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from megabagel.config.schema import ResizeConfig


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


def to_rgb(image: Image.Image) -> Image.Image:
    """The first frame as a viewer shows it, in 8-bit RGB: turned as EXIF says, transparency on white.

    16-bit grey (PNG, TIFF, PGM) is scaled to 8 bits, not clipped.

    Raises:
        ValueError: a pixel format without a defined range (floating point) or without a conversion to RGB.
        OSError, SyntaxError and others: Pillow, when the data is damaged.
    """
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64) / 257  # 65535 = 257 * 255
        return Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        page = Image.new("RGB", layer.size, "white")
        page.paste(layer, mask=layer.getchannel("A"))
        return page
    return image.convert("RGB")

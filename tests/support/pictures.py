"""Image files made on the fly: sound, odd and bad ones."""

import io
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Random pixels: no two images of different seed or size are alike."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The encoded file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(orientation: int, image: Image.Image, format: str = "PNG") -> bytes:
    """A file with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(image, format, exif=exif)


def grey16(width: int, height: int) -> bytes:
    """A 16-bit grey PNG that uses the whole range."""
    levels = np.linspace(0, 65535, width * height).astype(np.uint16).reshape(height, width)
    return file_of(Image.fromarray(levels))


# name: (file, (height, width))
ODD = {
    "plain.png": (file_of(noise(20, 10)), (10, 20)),
    "plain.jpg": (file_of(noise(20, 10), "JPEG"), (10, 20)),
    "progressive.jpg": (file_of(noise(33, 17), "JPEG", progressive=True), (17, 33)),
    "grey.jpg": (file_of(noise(20, 10, "L"), "JPEG"), (10, 20)),
    "cmyk.jpg": (file_of(noise(20, 12, "CMYK"), "JPEG"), (12, 20)),
    "cmyk.tif": (file_of(noise(20, 12, "CMYK"), "TIFF"), (12, 20)),
    "grey16.png": (grey16(16, 8), (8, 16)),
    "palette.png": (file_of(noise(20, 10).quantize(8)), (10, 20)),
    "palette-clear.png": (file_of(noise(20, 10).quantize(8), transparency=0), (10, 20)),
    "la.png": (file_of(noise(9, 7, "LA")), (7, 9)),
    "rgba.png": (file_of(noise(9, 7, "RGBA")), (7, 9)),
    "bits.png": (file_of(noise(9, 7, "L").convert("1")), (7, 9)),
    "turned.jpg": (turned(6, noise(40, 24), "JPEG"), (40, 24)),
    "turned.png": (turned(5, noise(40, 24)), (40, 24)),
    "upside-down.jpg": (turned(3, noise(40, 24), "JPEG"), (24, 40)),
    "animated.gif": (file_of(noise(20, 10), "GIF", save_all=True, append_images=[noise(20, 10, seed=1)]), (10, 20)),
    "animated.webp": (file_of(noise(20, 10), "WEBP", save_all=True, append_images=[noise(20, 10, seed=1)]), (10, 20)),
    "pixel.png": (file_of(noise(1, 1)), (1, 1)),
    "strip.png": (file_of(noise(400, 2)), (2, 400)),
    "misnamed.png": (file_of(noise(20, 10), "JPEG"), (10, 20)),
}

_JPEG, _PNG = file_of(noise(64, 64), "JPEG"), file_of(noise(64, 64))

# name: (file, reason)
BAD = {
    "zero.jpg": (b"", "zero bytes"),
    "text.png": (b"this is not a picture", "not an image"),
    "half.jpg": (_JPEG[: len(_JPEG) // 2], "damaged image"),
    "half.png": (_PNG[: len(_PNG) // 2], "damaged image"),
    "header.png": (_PNG[:20], "damaged image"),
    "flipped.png": (_PNG[:2000] + bytes([_PNG[2000] ^ 0xFF]) + _PNG[2001:], "damaged image"),
    "line.png": (file_of(noise(402, 2)), "extreme aspect"),
    "column.png": (file_of(noise(1, 201)), "extreme aspect"),
    "float.tif": (file_of(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "damaged image"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),
}

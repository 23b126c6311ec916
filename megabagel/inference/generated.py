"""Generated pictures, saved as PNGs whose metadata hold the prompt, seed and settings."""

import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from megabagel.errors import UserError

METADATA = "megabagel"
"""Key of a PNG's text chunk with everything that made the picture."""


@dataclass(frozen=True, eq=False)
class Generated:
    """One generated picture and what made it."""

    pixels: np.ndarray
    """uint8 [height, width, 3]."""
    about: dict[str, Any] = field(default_factory=dict)
    """Prompt, seed, settings, thought and the weights' digest; no time, path or host."""

    @property
    def image(self) -> Image.Image:
        """As a Pillow image."""
        return Image.fromarray(self.pixels)

    def png(self) -> bytes:
        """A PNG that holds `about`: the same request gives the same bytes."""
        info = PngImagePlugin.PngInfo()
        info.add_itxt(METADATA, json.dumps(self.about, sort_keys=True, ensure_ascii=False))
        file = io.BytesIO()
        self.image.save(file, "PNG", pnginfo=info)
        return file.getvalue()

    def save(self, path: str | Path) -> None:
        """Write `png()` to a file."""
        try:
            Path(path).write_bytes(self.png())
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror or error}); name a file in a folder"
            ) from error


def read_metadata(path: Path) -> dict[str, Any]:
    """Prompt, settings and seed that made a PNG. Raises UserError for a file that this program did not write."""
    try:
        with Image.open(path) as image:
            found = json.loads(getattr(image, "text", {})[METADATA])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: holds no settings of a generated picture ({error!r}); name a PNG of generate or edit"
        ) from error
    return dict(found)


def image_digest(image: Image.Image) -> str:
    """Of a picture's pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()

"""Engine `host`, the reference: Pillow decodes and resizes, bit for bit as the official data pipeline.

The pixels do not depend on the version of Pillow. Up to version 12 it resamples rows first, then columns, and rounds to
8 bits in between; version 13 swaps the passes if an image shrinks more in height than in width, which moves single
pixels by up to 20 levels. This engine always resamples rows first.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from megabagel.data.decode.contract import DecodeError, Request, Views, unit_range
from megabagel.data.decode.headers import decode


@dataclass(frozen=True)
class HostEngine:
    """Pillow on the CPU: bicubic with antialiasing from the full image (docs/bagel.md#image-sizes)."""

    threads: int = 1
    """Images decoded in parallel: Pillow releases the GIL while it decodes and resizes."""

    def __call__(self, requests: Sequence[Request]) -> list[Views | DecodeError]:
        """See `contract.DecodeEngine`."""
        if self.threads == 1:
            return [decode_image(request) for request in requests]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(decode_image, requests))


def decode_image(request: Request) -> Views | DecodeError:
    """Decode one file into its views."""
    try:
        image = decode(request.blob)
    except DecodeError as error:
        return error
    return [_view(image, height, width) for height, width in request.sizes]


def resample(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image: bicubic, antialiased, rows first. A side that keeps its size is not resampled."""
    bicubic = Image.Resampling.BICUBIC
    # Two calls fix the order of the passes, which a single call leaves to the version of Pillow.
    return image.resize((width, image.height), bicubic).resize((width, height), bicubic)


def _view(image: Image.Image, height: int, width: int) -> torch.Tensor:
    levels = np.array(resample(image, height, width))
    return unit_range(torch.from_numpy(levels).permute(2, 0, 1).contiguous())

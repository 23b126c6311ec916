"""What a decode engine is: many files in, for each its views or the reason why there are none.

Sizes are known before (`headers.measure`, when the index is built), so packing never waits for pixels. An engine keeps
nothing between calls but notes for the log: nothing to checkpoint, any image at any time, and the pixels of an image do
not depend on the files that come with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megabagel.data.documents import SampleError


class DecodeError(SampleError):
    """The bytes are not an image that can be used."""


@dataclass(frozen=True)
class Request:
    """An image file and the (height, width) of every view wanted of it, say one for the VAE and one for the ViT."""

    blob: bytes
    sizes: tuple[tuple[int, int], ...]


Views = list[torch.Tensor]
"""Per size of the request: float32 [3, height, width] in [-1, 1], on the CPU or on the engine's GPU."""

DecodeEngine = Callable[[Sequence[Request]], list[Views | DecodeError]]
"""One outcome per request, in their order. A bad file costs its own views alone; an engine raises on no file."""


def unit_range(levels: torch.Tensor) -> torch.Tensor:
    """Levels 0 to 255 of any type as float32 in [-1, 1]: x / 255, then (x - 0.5) / 0.5, each step rounded."""
    return levels.float().div_(255).sub_(0.5).div_(0.5)

"""Interface of a decode engine: a batch of image files in, per file its views or an error out.

Sizes are already known from the index (`headers.measure`), so packing never waits for pixels. An engine keeps no state
between calls except counters for the log: there is nothing to checkpoint, images can be decoded in any order, and the
pixels of an image do not depend on the other files of its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megabagel.data.documents import SampleError

if TYPE_CHECKING:  # headers are read by processes that have no use for torch: it takes seconds and 200 MiB
    import torch


class DecodeError(SampleError):
    """The bytes are not a usable image."""


@dataclass(frozen=True)
class Request:
    """An image file, and the (height, width) in pixels of every view of it, for example for the VAE and for the ViT."""

    blob: bytes
    sizes: tuple[tuple[int, int], ...]


Views = list["torch.Tensor"]
"""One tensor per size of the request: float32 [3, height, width] in [-1, 1], on the CPU or on the engine's GPU."""

DecodeEngine = Callable[[Sequence[Request]], list[Views | DecodeError]]
"""Returns one outcome per request, in order. A bad file gives a DecodeError for itself alone and raises nothing."""


def unit_range(levels: "torch.Tensor") -> "torch.Tensor":
    """Convert levels 0 to 255 of any type to float32 in [-1, 1]."""
    # In these steps, each rounded to float32, not as x / 127.5 - 1: bit for bit as the official pipeline.
    return levels.float().div_(255).sub_(0.5).div_(0.5)

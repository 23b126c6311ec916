"""Engine `dali`: NVIDIA DALI decodes what it decodes like Pillow, in batches, on the CPU or on the GPU.

A file goes to engine `host` by what its header says (`_why_not`) or when DALI refuses it alone, never because of its
neighbours. Views are resampled by torch on the same device: like Pillow's within 2 levels of 255, where DALI's own
resize differs by up to 27 (docs/data.md). Orientation is read as the host engine reads it.
"""

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from megabagel.data.decode.contract import DecodeError, Request, Views, unit_range
from megabagel.data.decode.headers import damage_is_named, open_image, orientation
from megabagel.data.decode.host import decode_image

if TYPE_CHECKING:
    from nvidia.dali.experimental.dynamic import EvalContext

logger = logging.getLogger(__name__)

_PNG_DEPTH = 24  # byte of a PNG that holds the bits per channel
_PNG_TURNED = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Chunks of a PNG that may hold an orientation, possibly after its pixels."""

_TURNS = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
"""EXIF orientation: whether rows and columns are swapped, and then the axes of [height, width] to mirror."""


@dataclass(frozen=True)
class DaliEngine:
    """DALI's decoders for JPEG, PNG and WebP in plain 8-bit RGB, grey or opaque palette; Pillow for everything else."""

    device: str = "cpu"
    """`cpu`, or a CUDA device: JPEG is decoded on the GPU then, and views stay there."""
    threads: int = 1
    """CPU threads of DALI's own pool."""
    by_host: Counter[str] = field(default_factory=Counter, compare=False)
    """Files decoded by engine `host` so far, by reason."""

    def __call__(self, requests: Sequence[Request]) -> list[Views | DecodeError]:
        """See `contract.DecodeEngine`."""
        outcomes: dict[int, Views | DecodeError] = {}
        turns: dict[int, int] = {}
        for number, request in enumerate(requests):
            try:
                why, turn = _why_not(request.blob)
            except DecodeError as error:
                outcomes[number] = error
                continue
            if why:
                outcomes[number] = self._host(request, why)
            else:
                turns[number] = turn
        images = _decode([requests[number].blob for number in turns], self.device, self.threads)
        for (number, turn), image in zip(turns.items(), images, strict=True):
            request = requests[number]
            if image is None:
                outcomes[number] = self._host(request, "refused by DALI")
            else:
                outcomes[number] = [_view(_turned(image, turn), size) for size in request.sizes]
        return [outcomes[number] for number in range(len(requests))]

    def _host(self, request: Request, why: str) -> Views | DecodeError:
        if not self.by_host[why]:
            logger.info("decode engine dali: %s goes to engine host; further ones are only counted", why)
        self.by_host[why] += 1
        return decode_image(request)


def _why_not(blob: bytes) -> tuple[str | None, int]:
    """Why DALI is not to decode a file (None: it is), and the orientation to apply after it.

    Raises:
        DecodeError: no engine decodes the file.
    """
    image = open_image(blob)
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    if kind not in ("JPEG", "PNG", "WEBP"):
        return kind, 1
    if image.mode not in ("1", "L", "P", "RGB"):
        return f"{kind} of mode {image.mode}", 1
    if image.has_transparency_data:
        return f"{kind} with transparency", 1
    if getattr(image, "is_animated", False) and kind != "JPEG":
        return f"animated {kind}", 1
    if kind == "PNG":
        if blob[_PNG_DEPTH] == 16:
            return "PNG of 16 bits", 1
        return ("PNG with EXIF or XMP" if any(mark in blob for mark in _PNG_TURNED) else None), 1
    with damage_is_named():
        return None, orientation(image)


_contexts = threading.local()


def _context(device: str, threads: int) -> "EvalContext":
    """DALI's thread pool and stream; one per calling thread, since a context serves one at a time."""
    import nvidia.dali.experimental.dynamic as ndd

    made = _contexts.__dict__.setdefault("made", {})
    if (device, threads) not in made:
        where = torch.device(device)
        number = (where.index or 0) if where.type == "cuda" else None
        made[device, threads] = ndd.EvalContext(num_threads=threads, device_id=number)
    return made[device, threads]


def _decode(blobs: Sequence[bytes], device: str, threads: int) -> list[torch.Tensor | None]:
    """uint8 [height, width, 3] per file as it is stored; None where DALI refuses.

    An error takes DALI's whole batch and need not name a file: then each is tried alone, so that every file meets the
    outcome that it would meet among others.
    """
    parsed = [number for number, blob in enumerate(blobs) if _parses(blob, threads)]
    images: dict[int, torch.Tensor] = {}
    try:
        images = dict(zip(parsed, _batch([blobs[number] for number in parsed], device, threads), strict=True))
    except RuntimeError:
        for number in parsed:
            with suppress(RuntimeError):
                (images[number],) = _batch([blobs[number]], device, threads)
    return [images.get(number) for number in range(len(blobs))]


def _parses(blob: bytes, threads: int) -> bool:
    """Whether DALI understands a file's structure, asked for this file alone.

    Two files of one large batch that it does not understand end the process (DALI 2.4.0: an exception in a thread of
    its own), so none of them may enter a batch.
    """
    import nvidia.dali.experimental.dynamic as ndd

    with _context("cpu", threads), ndd.EvalMode.sync_cpu:
        try:
            ndd.peek_image_shape(ndd.batch([np.frombuffer(blob, np.uint8)]))
        except RuntimeError:
            return False
    return True


def _batch(blobs: Sequence[bytes], device: str, threads: int) -> list[torch.Tensor]:
    import nvidia.dali.experimental.dynamic as ndd
    from nvidia.dali import types

    if not blobs:
        return []
    with _context(device, threads), ndd.EvalMode.sync_cpu:
        images = ndd.decoders.image(
            ndd.batch([np.frombuffer(blob, np.uint8) for blob in blobs]),
            device="gpu" if device.startswith("cuda") else "cpu",
            output_type=types.DALIImageType.RGB,  # ANY_DATA corrupts the heap on grey JPEG (DALI 2.4.0)
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as libjpeg does on the CPU
        )
        return [torch.from_dlpack(image) for image in images.tensors]


def _turned(image_hw3: torch.Tensor, turn: int) -> torch.Tensor:
    """The image as it is shown."""
    swap, mirror = _TURNS.get(turn, (False, ()))
    shown = image_hw3.transpose(0, 1) if swap else image_hw3
    return shown.flip(mirror) if mirror else shown


def _view(image_hw3: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    levels = image_hw3.permute(2, 0, 1)
    if levels.shape[1:] != size:
        levels = resample_floats(levels, size) if levels.is_cuda else resample_bytes(levels, size)
    return unit_range(levels.contiguous())


def resample_bytes(levels_3hw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 at another size, on the CPU: torch too resamples rows first and rounds in between."""
    return F.interpolate(levels_3hw[None], size, mode="bicubic", antialias=True)[0]


def resample_floats(levels_3hw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The same in float32, for GPUs, where torch does not resample uint8: whole levels after each pass."""
    for step in ((levels_3hw.shape[1], size[1]), size):
        levels = F.interpolate(levels_3hw[None].float(), step, mode="bicubic", antialias=True)[0]
        levels_3hw = levels.round_().clamp_(0, 255)
    return levels_3hw

"""Engine `dali`: NVIDIA DALI decodes the formats on which it agrees with Pillow, in batches, on the CPU or the GPU.

All other files go to engine `host`, by their header (`_why_not`) or because DALI refuses them; the decision depends on
the file alone, not on the other files of its batch. Views are resampled by torch on the same device, which agrees with
Pillow within 2 levels of 255; DALI's own resize differs by up to 27 (docs/data.md). Orientation is read by the same
code as in the host engine.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
"""Marks of PNG chunks that may hold an orientation, possibly after the pixels."""

_TURNS = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
"""By EXIF orientation: whether rows and columns are swapped, and the axes of [height, width] to mirror afterwards."""


@dataclass(frozen=True)
class DaliEngine:
    """DALI's decoders for JPEG, PNG and WebP in plain 8-bit RGB, grey or opaque palette; Pillow for everything else."""

    device: str = "cpu"
    """`cpu`, or a CUDA device: then JPEG is decoded on the GPU and views stay there."""
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
        views = on_own_stream(self.device, lambda: self._views(requests, turns))
        for number, found in zip(turns, views, strict=True):
            outcomes[number] = self._host(requests[number], "refused by DALI") if found is None else found
        return [outcomes[number] for number in range(len(requests))]

    def _views(self, requests: Sequence[Request], turns: Mapping[int, int]) -> list[Views | None]:
        """Views of the requests that `turns` names, with their orientations; None where DALI refuses the file."""
        images = _decode([requests[number].blob for number in turns], self.device, self.threads)
        return [
            None if image is None else [_view(_turned(image, turn), size) for size in requests[number].sizes]
            for (number, turn), image in zip(turns.items(), images, strict=True)
        ]

    def _host(self, request: Request, why: str) -> Views | DecodeError:
        if not self.by_host[why]:
            logger.info("decode engine dali: %s goes to engine host; further ones are only counted", why)
        self.by_host[why] += 1
        return decode_image(request)


def _why_not(blob: bytes) -> tuple[str | None, int]:
    """Decide from its header whether DALI decodes a file.

    Returns:
        The reason why engine `host` has to decode it (None: DALI does), and the EXIF orientation to apply after DALI.

    Raises:
        DecodeError: no engine can decode the file.
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


_streams = threading.local()


def on_own_stream(device: str, work: Callable[[], list[Views | None]]) -> list[Views | None]:
    """Run `work` on a CUDA stream of this thread and wait for it; on a CPU, just run it.

    DALI's tensors are read without a copy and its pool gives their memory to the next batch, on a stream that waits for
    nobody. On torch's default stream the resampling of views would be queued behind seconds of training kernels, and
    would read the next batch's pixels. Waiting here, while `work` still holds the images, excludes it, and decoding
    does not wait for training.
    """
    if not device.startswith("cuda"):
        return work()
    where = torch.device(device)
    streams = _streams.__dict__.setdefault("made", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(where)
    with torch.cuda.stream(streams[device]):
        found = work()
        streams[device].synchronize()
    reader = torch.cuda.current_stream(where)
    for view in (view for views in found if views is not None for view in views):
        # The allocator may give the memory to this stream again only after the reader's kernels.
        view.record_stream(reader)
    return found


_contexts = threading.local()


def _context(device: str, threads: int) -> "EvalContext":
    """DALI's thread pool and stream. One per calling thread, because a context serves only one thread at a time."""
    import nvidia.dali.experimental.dynamic as ndd

    made = _contexts.__dict__.setdefault("made", {})
    if (device, threads) not in made:
        where = torch.device(device)
        number = (where.index or 0) if where.type == "cuda" else None
        made[device, threads] = ndd.EvalContext(num_threads=threads, device_id=number)
    return made[device, threads]


def _decode(blobs: Sequence[bytes], device: str, threads: int) -> list[torch.Tensor | None]:
    """Decode files with DALI.

    Returns:
        Per file uint8 [height, width, 3] without its orientation applied, or None if DALI refuses the file.
    """
    parsed = [number for number, blob in enumerate(blobs) if _parses(blob, threads)]
    images: dict[int, torch.Tensor] = {}
    try:
        images = dict(zip(parsed, _batch([blobs[number] for number in parsed], device, threads), strict=True))
    # An error fails DALI's whole batch and need not name a file. Each file is then decoded alone, so that its outcome
    # does not depend on the others.
    except RuntimeError:
        for number in parsed:
            with suppress(RuntimeError):
                (images[number],) = _batch([blobs[number]], device, threads)
    return [images.get(number) for number in range(len(blobs))]


def _parses(blob: bytes, threads: int) -> bool:
    """Return whether DALI can parse the structure of a file; each file is tested alone.

    Two unparsable files in one large batch end the process (DALI 2.4.0: an exception in one of its own threads), so no
    unparsable file may enter a batch.
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
            # Not ANY_DATA, which corrupts the heap on grey JPEG (DALI 2.4.0).
            output_type=types.DALIImageType.RGB,
            # Applied afterwards, as the host engine reads it.
            adjust_orientation=False,
            # As libjpeg, and so Pillow, on the CPU.
            jpeg_fancy_upsampling=True,
        )
        return [torch.from_dlpack(image) for image in images.tensors]


def _turned(image_hw3: torch.Tensor, turn: int) -> torch.Tensor:
    """Apply an EXIF orientation."""
    swap, mirror = _TURNS.get(turn, (False, ()))
    shown = image_hw3.transpose(0, 1) if swap else image_hw3
    return shown.flip(mirror) if mirror else shown


def _view(image_hw3: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    levels = image_hw3.permute(2, 0, 1)
    if levels.shape[1:] != size:
        levels = resample_floats(levels, size) if levels.is_cuda else resample_bytes(levels, size)
    return unit_range(levels.contiguous())


def resample_bytes(levels_3hw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize uint8 [3, height, width] to `size` (height, width) on the CPU. As Pillow in the host engine, torch
    resamples rows first and rounds to 8 bits between the passes."""
    return F.interpolate(levels_3hw[None], size, mode="bicubic", antialias=True)[0]


def resample_floats(levels_3hw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize as `resample_bytes`, for GPUs, where torch does not resample uint8."""
    # Two passes in float32, each rounded to whole levels, reproduce the rounding of the uint8 version.
    for step in ((levels_3hw.shape[1], size[1]), size):
        levels = F.interpolate(levels_3hw[None].float(), step, mode="bicubic", antialias=True)[0]
        levels_3hw = levels.round_().clamp_(0, 255)
    return levels_3hw

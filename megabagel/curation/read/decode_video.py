"""Frames of video files through PyAV (`pip install megabagel[video]`): variable frame rate, rotation, damage."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megabagel.curation.measure.shots import WIDTH
from megabagel.data.documents import SampleError
from megabagel.errors import UserError


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError("videos need PyAV; pip install 'megabagel[video]'") from error
    return av


def small_frames(path: Path) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """(seconds, grey levels [height, WIDTH]) of every frame, upright.

    A damaged file gives the frames before the damage.

    Raises:
        SampleError: the file has no video that can be decoded.
    """
    for seconds, frame in _frames(path):
        height = max(2, round(WIDTH * frame.height / frame.width))
        grey = frame.reformat(width=WIDTH, height=height, format="gray").to_ndarray()
        turns = _quarter_turns(frame)
        if turns:
            grey = np.asarray(Image.fromarray(np.rot90(grey, turns)).resize((WIDTH, _upright(frame, turns))))
        yield seconds, np.ascontiguousarray(grey)


def full_frames(path: Path, numbers: Sequence[int]) -> list[Image.Image]:
    """The frames with these numbers, upright, in RGB; fewer if the file is damaged before one of them.

    Args:
        path: the file.
        numbers: in ascending order.
    """
    wanted, found = set(numbers), []
    for number, (_, frame) in enumerate(_frames(path)):
        if number in wanted:
            image = frame.to_image()
            turns = _quarter_turns(frame)
            found.append(image.rotate(90 * turns, expand=True) if turns else image)
        if number >= max(wanted, default=0):
            break
    return found


def _frames(path: Path) -> Iterator[tuple[float, Any]]:
    av = _av()
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError, OSError) as error:
        raise SampleError("not a video", str(error)) from error
    with container:
        if not container.streams.video:
            raise SampleError("no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # workers are processes: threads of each would compete for the same cores
        rate = float(stream.average_rate or 25)
        number = 0
        for frame in _decoded(av, container.decode(stream)):
            yield (float(frame.time) if frame.time is not None else number / rate), frame
            number += 1
        if not number:
            raise SampleError("no frame can be decoded")


def _decoded(av: Any, frames: Iterable[Any]) -> Iterator[Any]:
    """Frames up to the first damage."""
    iterator = iter(frames)
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except (av.FFmpegError, ValueError):
            return


def _quarter_turns(frame: Any) -> int:
    """Quarter turns counter-clockwise that make a frame upright."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _upright(frame: Any, turns: int) -> int:
    width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    return max(2, round(WIDTH * height / width))

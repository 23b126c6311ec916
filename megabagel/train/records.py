"""Files of telemetry: metrics.jsonl, sample images and a TensorBoard event file.

Every write reaches the operating system before the call returns: a killed process loses no finished step.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megabagel.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). Free space or mend permissions, or set run.dir to another "
            "folder, and start again: the run goes on from its newest checkpoint."
        ) from error


class MetricsFile:
    """metrics.jsonl: one JSON object per step.

    Floats are written with repr, so that they read back bit for bit; NaN and Infinity as Python's json writes them.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Open for the steps after `step`; lines of later steps and a last line cut off by a crash are removed."""
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                _keep_lines(path, step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append one line."""
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with writing(self._path):
            self._file.close()


def _keep_lines(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`. The file is replaced atomically: a crash leaves the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    odd = 0
    with path.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            number = _step_of(line)
            odd += number is None and line.endswith(b"\n")
            if number is not None and number <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)
    if odd:
        logger.warning("%s: %d lines that are no record of a step were dropped", path, odd)


def _step_of(line: bytes) -> int | None:
    """Return the step of a line; None for a line cut off by a crash, or one that is not a record."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int and step >= 0 else None


class SampleFiles:
    """One PNG with sample images per sampled step."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open for the steps after `step`; images of later steps are removed."""
        self._folder = folder
        for path in folder.glob("step_*.png"):
            if path.stem > f"step_{step:08d}":
                with writing(path):
                    path.unlink()

    def write(self, step: int, encoded: bytes) -> None:
        """Write the PNG of a step."""
        path = self._folder / f"step_{step:08d}.png"
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)


class TensorBoardFile:
    """One TensorBoard event file with an event per step for all scalars, and events for images.

    Written directly rather than through `SummaryWriter`: its background thread turns a full disk into a traceback.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Open for the steps after `step`; the START event makes TensorBoard drop later steps of earlier files."""
        self._path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        self._records = RecordWriter(self._file)
        # The first event of a file must be this version string.
        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append the scalars of a step, tagged `train/name`; names with a slash are kept."""
        values = (
            Summary.Value(tag=name if "/" in name else f"train/{name}", simple_value=value)
            for name, value in record.items()
            if name != "step"
        )
        self._summarise(int(record["step"]), values)

    def write_image(self, step: int, encoded: bytes, size: tuple[int, int]) -> None:
        """Append a PNG; `size` is (height, width)."""
        image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=encoded)
        self._summarise(step, [Summary.Value(tag="samples", image=image)])

    def close(self) -> None:
        """Close the file."""
        with writing(self._path):
            self._file.close()

    def _summarise(self, step: int, values: Iterable[Summary.Value]) -> None:
        self._append(Event(step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        with writing(self._path):
            self._records.write(event.SerializeToString())
            self._records.flush()

"""The files that telemetry leaves behind. Each write reaches the operating system before the call returns."""

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
    """Turns what the operating system refuses into a user's error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). Free space or mend permissions, or set run.dir to another "
            "folder, and start again: the run goes on from its newest checkpoint."
        ) from error


class MetricsFile:
    """metrics.jsonl: a JSON object per step. Floats read back bit for bit; NaN and Infinity as Python writes them."""

    def __init__(self, path: Path, step: int) -> None:
        """Open for steps after `step`; later lines, and one that a crash cut off, are dropped."""
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
    """Keep the lines of steps up to `step`; at any moment the file is either the old or the new one."""
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
    """Step of a line; None for one that a crash cut off, or that is none of ours."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int and step >= 0 else None


class SampleFiles:
    """A PNG per step with sample images."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open for steps after `step`; the pictures of later ones are removed."""
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
    """One TensorBoard event file: an event per step with all its scalars, and images.

    Written in place rather than through `SummaryWriter`, whose background thread reports a full disk as a traceback.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Open for steps after `step`; TensorBoard forgets what earlier files hold beyond it."""
        self._path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        self._records = RecordWriter(self._file)
        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append the scalars of a step: `name` as train/name, `name/part` as it is."""
        values = (
            Summary.Value(tag=name if "/" in name else f"train/{name}", simple_value=value)
            for name, value in record.items()
            if name != "step"
        )
        self._summarise(int(record["step"]), values)

    def write_image(self, step: int, encoded: bytes, size: tuple[int, int]) -> None:
        """Append a PNG of (height, width)."""
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

"""Telemetry of a run: metrics, TensorBoard events, sample images and console output.

RUN/metrics.jsonl               a line per step, every number in full precision
RUN/tensorboard/                the same, and sample images
RUN/samples/step_00000100.png   sample images with their prompts
console                         a line every `telemetry.log_every` steps, or a progress bar on a terminal
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megabagel.config.schema import Config
from megabagel.train.console import ProgressBar, StepLines
from megabagel.train.contact_sheet import contact_sheet, png
from megabagel.train.records import MetricsFile, SampleFiles, TensorBoardFile


class Telemetry:
    """Writer of a run's records. Rank 0 writes; on other ranks every call does nothing.

    When a run resumes from step k, records after k are removed, so that every step is recorded exactly once. Methods
    raise UserError, naming the path, if a file cannot be written.
    """

    def __init__(self, config: Config, first: bool = True, step: int = 0) -> None:
        self._config, self._folder, self._active = config, Path(config.run.dir), first
        if first:
            self._open(step)

    def _open(self, step: int) -> None:
        """Open all outputs for the steps after `step`."""
        self._metrics = MetricsFile(self._folder / "metrics.jsonl", step)
        self._samples = SampleFiles(self._folder / "samples", step)
        board = self._config.telemetry.tensorboard
        self._board = TensorBoardFile(self._folder / "tensorboard", step) if board else None
        bar = sys.stdout.isatty()
        steps, every = self._config.train.steps, self._config.telemetry.log_every
        self._console = (ProgressBar if bar else StepLines)(steps, every, step)

    def rewind(self, step: int) -> None:
        """Remove what was recorded after `step`, to which the run was rolled back."""
        if self._active:
            self._close()
            self._open(step)

    def log_step(self, record: Mapping[str, float | int]) -> None:
        """Record one finished step: numbers by name, including `step`."""
        if self._active:
            self._metrics.write(record)
            if self._board:
                self._board.write(record)
            self._console.show(record)

    def log_images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Record sample images of a step: prompt -> uint8 [height, width, 3]."""
        if self._active:
            sheet = contact_sheet(pictures)
            encoded = png(sheet)
            self._samples.write(step, encoded)
            if self._board:
                self._board.write_image(step, encoded, sheet.shape[:2])

    def close(self) -> None:
        """Close all outputs and print where they are."""
        if self._active:
            self._close()
            print("\n".join(_left_behind(self._folder)), flush=True)

    def _close(self) -> None:
        self._console.close()
        self._metrics.close()
        if self._board:
            self._board.close()


def _left_behind(folder: Path) -> list[str]:
    """Return one line for each output of the run that exists."""
    lines = [f"metrics      {folder / 'metrics.jsonl'}"]
    if (folder / "tensorboard").is_dir():
        lines.append(f"tensorboard  {folder / 'tensorboard'}  (tensorboard --logdir {folder / 'tensorboard'})")
    pictures = sorted((folder / "samples").glob("step_*.png"))
    if pictures:
        lines.append(f"samples      {pictures[-1]}")
    checkpoints = folder / "checkpoints"
    if (checkpoints / "latest").is_file():
        newest = (checkpoints / "latest").read_text(errors="replace").strip()
        lines.append(f"checkpoint   {checkpoints / newest}")
    return lines

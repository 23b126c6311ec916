import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megabagel.config.schema import Config, RunConfig, TelemetryConfig, TrainConfig
from megabagel.errors import UserError
from megabagel.train.console import describe
from megabagel.train.contact_sheet import GAP, contact_sheet
from megabagel.train.telemetry import Telemetry


def config(folder: Path, steps: int = 10, log_every: int = 1, tensorboard: bool = True) -> Config:
    return Config(
        run=RunConfig(dir=str(folder)),
        train=TrainConfig(steps=steps),
        telemetry=TelemetryConfig(log_every=log_every, tensorboard=tensorboard),
    )


def record(step: int) -> dict[str, float | int]:
    return {"step": step, "loss": math.pi / step, "loss_ce": 1 / 3, "loss_mse/t2i": 1e-17 * step, "tokens": 1000 + step}


def metrics(folder: Path) -> list[dict[str, float | int]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_every_step_is_recorded_in_full_precision(tmp_path: Path) -> None:
    telemetry = Telemetry(config(tmp_path, log_every=5))
    written = [record(step) for step in range(1, 11)]
    for row in written:
        telemetry.log_step(row)
        assert metrics(tmp_path)[-1] == row  # readable at once, bit for bit
    telemetry.close()
    assert metrics(tmp_path) == written
    assert scalars(tmp_path, "train/loss") == [(row["step"], np.float32(row["loss"])) for row in written]
    assert scalars(tmp_path, "loss_mse/t2i") == [(row["step"], np.float32(row["loss_mse/t2i"])) for row in written]


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = Telemetry(config(tmp_path))
    for step in range(1, 8):
        first.log_step(record(step) | {"loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # cut off by a crash

    second = Telemetry(config(tmp_path), step=4)
    for step in range(5, 7):
        second.log_step(record(step) | {"loss": 2.0})
    second.close()

    assert [(row["step"], row["loss"]) for row in metrics(tmp_path)] == [
        *((s, 1.0) for s in range(1, 5)),
        (5, 2),
        (6, 2),
    ]
    assert scalars(tmp_path, "train/loss") == [*((s, 1.0) for s in range(1, 5)), (5, 2), (6, 2)]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_fresh_start_in_a_used_folder_begins_anew(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        telemetry = Telemetry(config(tmp_path))
        telemetry.log_step(record(1) | {"loss": loss})
        telemetry.close()
    assert [row["loss"] for row in metrics(tmp_path)] == [2.0]
    assert scalars(tmp_path, "train/loss") == [(1, 2.0)]


def test_other_ranks_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(config(tmp_path), first=False)
    telemetry.log_step(record(1))
    telemetry.log_images(1, {"a": np.zeros((8, 8, 3), np.uint8)})
    telemetry.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_console_lines_and_closing_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010")
    telemetry = Telemetry(config(tmp_path, steps=10, log_every=4, tensorboard=False))
    for step in range(1, 11):
        telemetry.log_step(record(step) | {"lr": 1e-3, "seconds": 0.25})
    telemetry.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "step  4/10  loss 0.7854  ce 0.3333  lr 1.00e-03  0.25 s",
        "step  8/10  loss 0.3927  ce 0.3333  lr 1.00e-03  0.25 s",
        "step 10/10  loss 0.3142  ce 0.3333  lr 1.00e-03  0.25 s",
    ]
    assert lines[3:] == [
        f"metrics      {tmp_path}/metrics.jsonl",
        f"checkpoint   {tmp_path}/checkpoints/step_00000010",
    ]
    assert not (tmp_path / "tensorboard").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    telemetry = Telemetry(config(tmp_path, steps=9, log_every=2, tensorboard=False), step=3)
    for step in range(4, 8):
        telemetry.log_step(record(step))
    telemetry.close()
    assert "7/9" in terminal.getvalue()
    assert describe(record(6)) in terminal.getvalue()
    assert describe(record(7)) not in terminal.getvalue()


def test_sample_sheet_is_a_png_and_in_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red, blue = np.zeros((32, 40, 3), np.uint8), np.zeros((16, 24, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    telemetry = Telemetry(config(tmp_path))
    telemetry.log_images(7, {"a red box": red, "a blue box with a rather long description": blue})
    telemetry.close()
    with Image.open(tmp_path / "samples" / "step_00000007.png") as image:
        shown = np.asarray(image)
    assert np.array_equal(shown, contact_sheet({"a red box": red, "a blue box with a rather long description": blue}))
    assert (shown == (255, 0, 0)).all(-1).sum() == 160 * 128
    assert (shown == (0, 0, 255)).all(-1).sum() == 168 * 112
    assert (shown[GAP : GAP + 128, GAP : GAP + 160] == (255, 0, 0)).all()
    assert ((shown[GAP + 128 :] < 128).all(-1)).any(), "no caption"

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Images("samples")
    assert (event.step, event.height, event.width) == (7, *shown.shape[:2])
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert np.array_equal(np.asarray(image), shown)
    assert f"samples      {tmp_path}/samples/step_00000007.png" in capsys.readouterr().out


def full_metrics(folder: Path) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")


def file_in_the_way(name: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_text("")

    return prepare


@pytest.mark.parametrize(
    ("prepare", "path"),
    [
        (lambda folder: folder.write_text(""), "metrics.jsonl"),
        (full_metrics, "metrics.jsonl"),
        (file_in_the_way("samples"), "samples/step_00000001.png"),
        (file_in_the_way("tensorboard"), "tensorboard/events"),
    ],
)
def test_a_disk_that_refuses_is_a_user_error_naming_the_path(
    tmp_path: Path, prepare: Callable[[Path], None], path: str
) -> None:
    folder = tmp_path / "run"
    prepare(folder)
    with pytest.raises(UserError, match=f"^{folder / path}.*: cannot be written .*run.dir"):
        telemetry = Telemetry(config(folder))
        telemetry.log_step(record(1))
        telemetry.log_images(1, {"a": np.zeros((8, 8, 3), np.uint8)})

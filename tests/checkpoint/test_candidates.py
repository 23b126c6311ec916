"""Which checkpoints a run that goes on tries first, whatever the times of the files are."""

import os
import shutil
from pathlib import Path

import pytest

from megabagel.checkpoint.api import _candidates
from megabagel.checkpoint.manifest import MANIFEST, identity, write_manifest
from megabagel.config.schema import ModelConfig


def write(root: Path, step: int, after: int | None = None, old: bool = False) -> None:
    """A checkpoint that was written when `latest` named the one of step `after`; `old`: as versions before wrote it."""
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "rank_00000.safetensors").write_bytes(b"numbers")
    about = {} if old else {"after": identity(root / f"step_{after:08d}") if after else ""}
    grid = dict.fromkeys(("tp", "pp", "vpp", "cp", "dp"), 1)
    write_manifest(folder, ModelConfig(), {}, step=step, grid=grid, ema=0.0, freeze=(), seed=0, **about)


def steps(root: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in _candidates(root)]


@pytest.mark.parametrize("newest", [2, 5, 8])
def test_a_copy_with_other_times_goes_on_with_the_branch_that_latest_names(tmp_path: Path, newest: int) -> None:
    """A run of 8 steps was taken up at 4 and has come to 5; copied, any of its files may be the newest."""
    for step, after in ((2, None), (4, 2), (6, 4), (8, 6), (5, 8)):
        write(tmp_path, step, after)
    (tmp_path / "latest").write_text("step_00000005")
    os.utime(tmp_path / "latest", ns=(0, 0))
    os.utime(tmp_path / f"step_{newest:08d}" / MANIFEST)
    assert steps(tmp_path) == [5, 4, 2]


def test_one_that_was_completed_before_latest_could_name_it_comes_first(tmp_path: Path) -> None:
    for step, after in ((2, None), (4, 2), (6, 4)):
        write(tmp_path, step, after)
    (tmp_path / "latest").write_text("step_00000004")
    assert steps(tmp_path) == [6, 4, 2]


def test_a_step_that_was_written_anew_is_another_checkpoint(tmp_path: Path) -> None:
    """A run of 4 steps was taken up at 1 and has written a step 2 of its own: 4 followed the other one."""
    for step, after in ((1, None), (2, 1), (4, 2)):
        write(tmp_path, step, after)
    shutil.rmtree(tmp_path / "step_00000002")
    write(tmp_path, 2, 4)
    (tmp_path / "latest").write_text("step_00000002")
    assert steps(tmp_path) == [2, 1]


def test_older_manifests_are_judged_by_their_times(tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path, step, old=True)
    (tmp_path / "latest").write_text("step_00000002")
    os.utime(tmp_path / "latest", ns=(0, 0))
    assert steps(tmp_path) == [4, 2]
    os.utime(tmp_path / "latest")
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("odd", [b"\xff\xfe", b"a\0b", b"", b"step_9", b"../../etc"])
def test_odd_bytes_in_latest_are_ignored(tmp_path: Path, odd: bytes) -> None:
    for step, after in ((2, None), (4, 2)):
        write(tmp_path, step, after)
    (tmp_path / "latest").write_bytes(odd)
    assert steps(tmp_path) == [4, 2]

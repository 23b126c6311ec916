"""What a user reads about a run that is over or was stopped by Ctrl-C, from its folder alone."""

from pathlib import Path

import pytest

from megabagel import cli
from megabagel.config.load import dump, load
from megabagel.config.schema import Config
from megabagel.runtime import phase
from megabagel.train.saved import finished, interrupted, newest
from tests.support.cli_harness import TINY
from tests.support.config_tree import change


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run of 60 steps that has ended."""
    made = change(TINY, {"run.dir": str(tmp_path / "run"), "train.steps": 60})
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000060"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    dump(made, tmp_path / "run" / "config.yaml")
    return made


def test_a_finished_run_is_named_at_once(config: Config) -> None:
    said = finished(config)
    assert said and "all 60 steps are done; train.steps=N with N above 60 goes on" in said and "step_00000060" in said


@pytest.mark.parametrize("key", ["train.steps", "train.lr"])
def test_a_run_with_other_settings_goes_the_long_way(config: Config, key: str) -> None:
    assert finished(change(config, {key: 61})) is None


def test_a_run_that_is_to_start_anew_is_not_finished(config: Config) -> None:
    assert finished(change(config, {"run.resume": "none"})) is None


@pytest.mark.parametrize("content", ["", "step_1", "../step_00000060", "step_00000061", "\x00"])
def test_a_damaged_name_of_the_newest_checkpoint_is_none(config: Config, content: str) -> None:
    (Path(config.run.dir) / "checkpoints" / "latest").write_text(content)
    assert newest(config) is None and finished(config) is None


def test_the_command_ends_without_training(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(tmp_path / "run" / "config.yaml")]
    assert load(words[1]) == config
    for nproc in ([], ["--nproc", "2"]):
        assert cli.main([*words, *nproc]) == 0
        assert "all 60 steps are done" in capsys.readouterr().out


def test_ctrl_c_says_what_is_saved(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase.now, "step", 67)
    said = interrupted(config)
    assert said.startswith("Ctrl-C after step 67 of 60: step 60 is saved in ") and "7 steps since are lost" in said
    assert "SIGTERM" in said
    (Path(config.run.dir) / "checkpoints" / "latest").unlink()
    assert "no checkpoint was written yet, 67 steps since are lost" in interrupted(config)

"""The command's last line of defence, and text that reaches the terminal."""

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megabagel import cli
from megabagel.errors import UserError, printable
from megabagel.log import PrintableFormatter


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Makes `megabagel doctor` (or another word) run a function of the test."""

    def use(action: Callable[[], int]) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("words", nargs="*")
        parser.set_defaults(run=lambda args: action())
        monkeypatch.setattr(cli, "_parser", lambda: parser)
        monkeypatch.setattr(cli, "_give_up_stdout", lambda: None)

    return use


def fail(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


class Panic(BaseException):
    """As a panic of a Rust library reaches Python (pyo3's PanicException)."""


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RecursionError("deep"), MemoryError(), ValueError("two\nlines"), OverflowError("\x1b"), Panic("x")],
)  # fmt: skip
def test_an_unforeseen_error_is_one_line_with_the_file(
    running: Callable[[Callable[[], int]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    running(fail(error))
    assert cli.main(["data", "index", "x.tar"]) == cli.UNFORESEEN
    told = capsys.readouterr().err
    assert told.startswith(f"megabagel: error: data index x.tar: {type(error).__name__}") and told.count("\n") == 1
    assert cli.TRACEBACK in told and "\x1b" not in told


@pytest.mark.parametrize(("word", "variable"), [("data", "1"), ("train", "")])
def test_a_traceback_is_to_be_had(
    running: Callable[[Callable[[], int]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    variable: str,
) -> None:
    """By the variable, and always for runs, where what fails is seldom a file."""
    monkeypatch.setenv(cli.TRACEBACK, variable)
    running(fail(KeyError("x")))
    assert cli.main([word]) == cli.UNFORESEEN
    assert "Traceback" in capsys.readouterr().err


def test_messages_cannot_command_the_terminal(
    running: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    running(fail(UserError("a\x1b]0;title\x07\u202e\udce9\nsecond line")))
    assert cli.main(["data"]) == 2
    assert capsys.readouterr().err == "megabagel: error: a\\x1b]0;title\\x07\\u202e\\xe9\nsecond line\n"


def test_readers_that_go_end_it_quietly(
    running: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    running(fail(BrokenPipeError()))
    assert cli.main(["data"]) == cli.NOBODY_READS
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_a_stdout_that_takes_nothing(tmp_path: Path, kind: str) -> None:
    """A real process: what is left in the buffer must not fail once more when the interpreter ends."""
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    words = [sys.executable, "-m", "megabagel", "data", "index", str(tmp_path / "t.jsonl"), "--task", "text"]
    if kind == "full disk":
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 74 and "No space left" in done.stderr and done.stderr.count("\n") == 1
        return
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (cli.NOBODY_READS, "")


def test_logs_cannot_command_the_terminal() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "sample %s\nlost", ("\x1b[2J",), None)
    assert PrintableFormatter().format(record) == "sample \\x1b[2J\nlost"


def test_printable_leaves_what_can_be_read() -> None:
    assert printable("Zoë, 日本語, 👩‍🚀 نمی‌خواهم") == "Zoë, 日本語, 👩‍🚀 نمی‌خواهم"
    assert printable("a\tb\r\n", keep="\t") == "a\tb\\r\\n"

"""Which errors end by name, with which exit code, and that documents and scripts go by the same table."""

import errno
import re
from pathlib import Path

import pytest

from megabagel import cli
from megabagel.errors import EXITS, BadStep, Preempted, TransientFailure, UserError, exit_table, named, no_space

ROOT = Path(__file__).parents[1]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("lr"), 2),
        (Preempted("x"), 75),
        (BadStep("x"), 77),
        (TransientFailure("x"), 74),
        (OSError(errno.EIO, "x"), 74),
        (no_space("x"), 74),
        (caused(UserError("x"), OSError(errno.ENOSPC, "x")), 74),
        (caused(UserError("x"), OSError(errno.ENOENT, "x")), 2),
        (caused(UserError("x"), caused(ValueError("x"), OSError(errno.ESTALE, "x"))), 74),
        (caused(Preempted("x"), OSError(errno.EIO, "x")), 75),
        (caused(RuntimeError("x"), OSError(errno.ENOSPC, "x")), 74),
    ],
)
def test_code_of_an_end(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("megabagel.commands.doctor._doctor", fail)
    assert cli.main(["doctor"]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("megabagel: ")


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOENT, "x"), OSError("x")])
def test_a_bug_has_no_name(error: Exception) -> None:
    assert named(error) is None


def test_a_failure_of_the_machine_keeps_the_message() -> None:
    assert str(named(caused(UserError("a.tar: cannot be read"), OSError(errno.EIO, "x")))) == "a.tar: cannot be read"
    assert str(no_space("it takes 5 KiB")) == "it takes 5 KiB"


def test_document_shows_the_table() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    shown = text.partition("<!-- exit-codes -->\n")[2].partition("<!-- /exit-codes -->\n")[0]
    assert shown == exit_table(), "print(megabagel.errors.exit_table())"


def test_batch_script_requeues_by_the_table() -> None:
    text = (ROOT / "examples" / "slurm" / "train.sbatch").read_text()
    codes = " ".join(re.findall(r"(?:INTERRUPTED|TRANSIENT)='?([\d ]+)", text))
    assert sorted(map(int, codes.split())) == sorted(row.code for row in EXITS if row.requeue)

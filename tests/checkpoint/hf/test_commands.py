"""`import-hf` and `export-hf` as commands: one process, no launcher, a summary, one message for a mistake."""

import re
from pathlib import Path

import pytest

from megabagel import cli
from tests.support.published import publish, weights
from tests.test_cli import megabagel


def test_there_and_back(tmp_path: Path) -> None:
    source = publish(tmp_path / "source", weights())
    imported = megabagel("import-hf", str(source), str(tmp_path / "checkpoint"))
    counts = rf"{len(weights())} tensors, [\d,]+ parameters, [\d,]+ bytes, [\d.]+ s"
    assert re.fullmatch(rf".*/checkpoint: {counts}\n", imported.stdout), imported
    exported = megabagel("export-hf", str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    assert re.fullmatch(rf".*/out: {counts}\nabsent: ae.safetensors, tokenizer files .*\n", exported.stdout), exported
    assert imported.stderr == exported.stderr == ""
    assert (tmp_path / "out" / "ema.safetensors").read_bytes() == (source / "ema.safetensors").read_bytes()
    again = megabagel("export-hf", str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    assert (again.returncode, again.stdout) == (2, "")
    assert re.fullmatch(r"megabagel: error: .*/out: exists already; .*\n", again.stderr)


@pytest.mark.parametrize(
    "words",
    [
        ("out",),
        ("dir", "out", "--llm", "a"),
        ("dir", "out", "--variant", "dense"),
        ("out", "--llm", "a", "--vit", "b"),
    ],
)
def test_either_a_folder_or_its_parts(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["import-hf", *words]) == 2
    assert "expected either DIR alone, or all of --llm, --vit and --vae" in capsys.readouterr().err

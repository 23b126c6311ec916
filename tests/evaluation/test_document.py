"""The commands of docs/evaluation.md run, in order, on a small run; what the page names exists."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megabagel import cli
from megabagel.evaluation.suites.registry import SUITES
from tests.evaluation.test_judges import said, server
from tests.evaluation.test_suites import small_data
from tests.support.cli_harness import command

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
VERDICT = "Consistency: 2\nRealism: 1\nAesthetic Quality: 1"


def test_every_suite_and_example_is_on_the_page() -> None:
    for name, suite in SUITES.items():
        assert f"| `{name}` |" in PAGE
        assert set(suite.rules) == {"published"} or f"| `{name}` |" in PAGE.partition("### Aggregation")[2]
    for path in (ROOT / "examples" / "sweeps").glob("*.yaml"):
        assert path.stem == "toy" or f"examples/sweeps/{path.name}" in PAGE
    for path in re.findall(r"`((?:examples|megabagel)/[\w./]+)`", PAGE):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_commands(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    with server(lambda number, body: said(VERDICT)) as (url, asked):
        for line in COMMANDS:
            words = shlex.split(line.replace("runs/scenes", str(trained)).replace("http://localhost:8000/v1", url))
            assert words.pop(0) == "megabagel"
            if words[:2] == ["evaluate", "loss"]:
                command(*words).succeeded()
                continue
            if words[0] == "sweep":
                words = ["sweep", str(ROOT / words[1]), *words[2:], "--list"]
            elif words[1] != "report":
                words += ["--limit", "3", "--steps", "3", *(["--size", "32"] if words[1] != "mme" else [])]
            assert cli.main(words) == 0, line
    assert len(asked) == 3
    first, second = (
        json.loads((tmp_path / "results" / name / "summary.json").read_text()) for name in ("wise", "replayed")
    )
    assert first["scores"] == second["scores"] and first["scored"] == 3
    assert first["scores"]["overall"]["value"] == pytest.approx((0.7 * 2 + 0.2 + 0.1) / 2)
    assert (tmp_path / "results" / "curve" / "emergence.md").is_file()
    assert (tmp_path / "results" / "report.png").is_file()
    assert (trained / "evaluation" / "loss" / "loss.png").is_file()
    assert "key" not in (tmp_path / "answers.jsonl").read_text()

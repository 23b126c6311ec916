"""`megabagel bench` before and after it measures: mistakes are told first, and nothing that was measured is lost."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megabagel import cli
from megabagel.bench.report import read, write
from megabagel.commands import bench
from tests.bench.test_report import ONE

TINY = Path(__file__).parents[2] / "examples" / "configs" / "tiny.yaml"
GRIDS = "grids:\n  - {nproc: 1}\n  - {nproc: 2, parallel.tp: 2}\n  - {nproc: 2, parallel.cp: 2}\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ranks of every measurement that was started; the third fails, the others write a report."""
    ranks: list[int] = []

    def spawn(command: list[str], nproc: int) -> int:
        ranks.append(nproc)
        if len(ranks) == 3:
            return 1
        write([replace(ONE, name=f"grid {len(ranks)}")], Path(command[command.index("--out") + 1]) / "bench.json")
        return 0

    monkeypatch.setattr(bench, "spawn", spawn)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return ranks


def sweep(folder: Path, grids: str, *words: str) -> int:
    (folder / "grids.yaml").write_text(grids)
    return cli.main(["bench", str(TINY), "--sweep", str(folder / "grids.yaml"), "--out", str(folder / "out"), *words])


def test_every_grid_is_checked_before_the_first_is_measured(
    started: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, GRIDS + "  - {nproc: 3, parallel.pp: 2}\n") == 2
    said = capsys.readouterr().err
    assert "grids.yaml: grids.3: world size = 3" in said and said.count("megabagel: error:") == 1
    assert not started
    assert sweep(tmp_path, GRIDS + "  - {nproc: 2, parallel.tq: 2}\n") == 2
    assert "parallel.tq" in capsys.readouterr().err and not started


def test_what_was_measured_before_a_failure_is_reported(started: list[int], tmp_path: Path) -> None:
    assert sweep(tmp_path, GRIDS) == 1
    assert started == [1, 2, 2]
    assert [m.name for m in read(tmp_path / "out" / "bench.json")] == ["grid 1", "grid 2"]


def test_options_that_would_do_nothing(started: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, GRIDS, "--nproc", "2") == 2
    assert "--nproc 2: the file says nproc of every grid" in capsys.readouterr().err
    for path in ("a.json", "b.json"):
        write([ONE], tmp_path / path)
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["bench", "compare", *files]) == 0
    assert cli.main(["bench", "compare", *files, "--steps", "4", "--profile"]) == 2
    assert "bench compare: --steps, --profile is about measuring" in capsys.readouterr().err
    assert not started


def test_a_mistake_is_told_before_megatron_is_imported(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "grids.yaml").write_text("grids: [{nproc: 3, parallel.tp: 2}]")
    code = (
        "import sys; from megabagel import cli; "
        "print(cli.main(sys.argv[1:]), any(name.startswith('megatron') for name in sys.modules))"
    )
    for words in (["--sweep", str(tmp_path / "grids.yaml")], ["train.steps=-1"], ["train.steps=-1", "--nproc", "2"]):
        command = [sys.executable, "-c", code, "bench", str(TINY), *words]
        assert subprocess.run(command, capture_output=True, text=True).stdout == "2 False\n"

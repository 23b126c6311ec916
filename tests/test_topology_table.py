"""The tool behind docs/topology.md: it runs the program on every grid and sees a curve that differs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("topology_table", ROOT / "tools" / "topology_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_differing_curve_fails(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = iter([[4.0, 2.0]] * (len(tool.GRIDS) - 1) + [[4.0, 2.0 * (1 + 3e-5)]])
    monkeypatch.setattr(tool, "curve", lambda *_: next(curves))
    monkeypatch.setattr(sys, "argv", ["topology_table.py", "any.yaml"])
    assert tool.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(tool.GRIDS)
    assert lines[2] == "| 1, 1, 1, 1, 1 | 1 | 2.000000000 | 0.0e+00 |"
    assert lines[-1] == "| 2, 2, 1, 2, 2 | 16 | 2.000060000 | 3.0e-05 |"


@pytest.mark.thorough
def test_it_runs_the_program(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tool, "GRIDS", ((1, 1, 1, 1, 1), (1, 2, 1, 1, 1)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config, out = ROOT / "examples" / "configs" / "tiny.yaml", tmp_path / "table.md"
    options = [f"data.root={tmp_path / 'shapes'}", "train.warmup=1", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["topology_table.py", str(config), *options])
    assert tool.main() == 0
    assert out.read_text().count("\n") == 4

"""A run that is killed again and again ends as one that never was (tools/kill_test.py, in short)."""

from pathlib import Path

import pytest

from tools.kill_test import differences, kill_test, markdown


@pytest.mark.slow
def test_three_kills_leave_no_trace(tmp_path: Path) -> None:
    report = kill_test(tmp_path, kills=3, steps=24, seed=7, grid=[])
    assert len(report.kills) == 3, report
    assert not report.differences, markdown(report)
    assert max(kill.seconds for kill in report.kills) < 30
    told = [f"step 3: loss is 1, not {0.1 + 0.2!r}"]
    lines = [f'{{"step": {step}, "loss": {0.1 + 0.2 if step == 3 else 1}}}\n' for step in range(1, 5)]
    for name, content in (("one", [*lines[:2], lines[2].replace(repr(0.1 + 0.2), "1"), lines[3]]), ("other", lines)):
        folder = tmp_path / name / "checkpoints"
        (folder / "step_00000004").mkdir(parents=True)
        (folder / "latest").write_text("step_00000004")
        (folder / "step_00000004" / "manifest.json").write_text('{"files": {}}')
        (tmp_path / name / "metrics.jsonl").write_text("".join(content))
    assert differences(tmp_path / "one", tmp_path / "other", 4) == told, "the comparison can fail"
    assert differences(tmp_path / "one", tmp_path / "other", 5)[0].startswith("steps on record: 4")

"""Benchmark scripts run; what they measure is for their results, not for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_model_step(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/model_step.py", "--runs", "1", "--out", tmp_path / "out.json"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == 2200 and 0 < found["cpu_share"] < 1.5


def test_attention_plan_draws_packs_of_every_kind() -> None:
    from benchmarks.attention_plan import PACKS, TOKENS, draw_pack

    for name in PACKS:
        pack = draw_pack(name, TOKENS, 0)
        assert 0.6 * TOKENS < pack.tokens <= TOKENS, name

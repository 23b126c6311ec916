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


@pytest.mark.slow
def test_packing_loses_less_and_balances_better(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/packing.py", "--steps", "1", "--out", tmp_path]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "packing.json").read_text()).values()
    mine, theirs = case["megabagel"], case["released"]
    assert mine["least"] >= 32768 and mine["fill"] > theirs["fill"]
    assert mine["6 a step"]["work"] < 1.05 < theirs["6 a step"]["work"]
    assert mine["over cp"] < 1.05 < theirs["over cp"]


def test_attention_plan_draws_packs_of_every_kind() -> None:
    from benchmarks.attention_plan import KINDS, TOKENS, fill

    for name, kind in KINDS.items():
        packs = [fill(kind, TOKENS, number) for number in range(2)]
        assert [pack.tokens for pack in packs] == [TOKENS, TOKENS], name
        assert packs[0].samples != packs[1].samples
        assert max(pack.samples[-1].tokens for pack in packs) < 0.4 * TOKENS, name  # the text that fills up

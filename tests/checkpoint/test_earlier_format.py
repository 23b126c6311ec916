"""Checkpoints of earlier versions: present names for their tensors, and runs that go on from them bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from megabagel.checkpoint.describe import differences
from megabagel.checkpoint.reader import Stored, verify
from tools.small_run import write_data

EARLIER = Path(__file__).parent / "earlier_format"
STEP = "step_00000002"
COMPUTED = ("step", "loss", "loss_ce", "loss_mse", "grad_norm", "tokens")


def test_tensors_have_their_present_names() -> None:
    verify(EARLIER / STEP)
    stored = Stored(EARLIER / STEP)
    assert {f"{kind}/embed.tokens.weight" for kind in ("weight", "exp_avg", "exp_avg_sq", "ema")} <= set(stored.index)
    assert not [key for key in stored.index if "embed.words" in key]
    piece = torch.cat(list(stored.whole("weight/embed.tokens.weight").read()))
    assert piece.shape == (320, 16) and piece.dtype == torch.float32 and 0.015 < piece.std() < 0.025
    assert not list(differences(EARLIER / STEP, EARLIER / STEP))


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    run = tmp_path / "run"
    shutil.copytree(EARLIER / STEP, run / "checkpoints" / STEP)
    (run / "checkpoints" / "latest").write_text(f"{STEP}\n")
    subprocess.run(
        [sys.executable, "-m", "megabagel", "train", str(EARLIER / "config.yaml")],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    before, now = (
        {record["step"]: {key: record[key] for key in COMPUTED} for record in map(json.loads, path.open())}
        for path in (EARLIER / "metrics.jsonl", run / "metrics.jsonl")
    )
    assert [now[step] for step in (3, 4)] == [before[step] for step in (3, 4)]
    new = Stored(run / "checkpoints" / "step_00000004")
    assert set(new.index) == set(Stored(EARLIER / STEP).index)
    assert "embed.words" not in (run / "checkpoints" / "step_00000004" / "index.json").read_text()

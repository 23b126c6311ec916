"""A short training run with every kernel in Triton's interpreter, from shards to the record."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "examples/configs/tiny.yaml"
SMALL = [
    "model.layers=1", "model.hidden=64", "model.heads=2", "model.kv_heads=1", "model.head_dim=16", "model.vocab=288",
    "data.min_tokens=80", "data.max_tokens=128", "parallel.chunk=8", "train.packs_per_step=1", "train.steps=2",
    "train.ema=0.5", "checkpoint.every=0", "telemetry.tensorboard=false",
]  # fmt: skip


def records(folder: Path, name: str) -> list[dict[str, float]]:
    """Lines of metrics.jsonl of a run with the kernels `name`."""
    options = [*SMALL, f"run.dir={folder}/{name}", f"data.root={folder}/data", f"parallel.kernels={name}"]
    command = [sys.executable, "-m", "megabagel", "train", str(CONFIG), *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"kernels between the linears: {name} (asked for)" in done.stdout + done.stderr
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.thorough
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_loss_is_that_of_torch(tmp_path: Path) -> None:
    """Noise is drawn by the kernel here, not given as in the golden cases."""
    tritons, torchs = (records(tmp_path, name) for name in ("triton", "torch"))
    for key in ("loss", "loss_ce", "loss_mse", "grad_norm"):
        expected, found = ([step[key] for step in run] for run in (torchs, tritons))
        assert found == pytest.approx(expected, rel=1e-5) and max(expected) > 0, key

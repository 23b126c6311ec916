"""The loss curve of tiny.yaml, bit for bit: a refactor that moves it by one bit fails here.

Sums are added in another order by other instruction sets, so the run is held to the plainest ones, with one thread. The
rest is arithmetic that all processors do alike: the first steps came out the same on an AMD Zen 4, and emulated by
`qemu-x86_64 -cpu` on a Haswell and an EPYC, whose approximate reciprocals and roots differ.
What should change the curve is recorded anew by `python -m tests.train.test_golden_curve`, and said so in the commit.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

STEPS = 20
FILE = Path(__file__).with_name("golden_curve.json")
CONFIG = Path(__file__).parents[2] / "examples/configs/tiny.yaml"
KEYS = ("loss", "loss_ce", "loss_mse", "grad_norm")
PLAIN = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
"""Arithmetic that every x86-64 machine does alike."""


def curve(folder: Path) -> list[dict[str, str]]:
    """Losses and gradient norms of the first steps, as hexadecimal floats."""
    options = [f"train.steps={STEPS}", f"run.dir={folder}/run", f"data.root={folder}/data", "checkpoint.every=0"]
    command = [sys.executable, "-m", "megabagel", "train", str(CONFIG), *options, "telemetry.tensorboard=false"]
    subprocess.run(command, env={**os.environ, **PLAIN}, check=True, capture_output=True)
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [{key: float(json.loads(line)[key]).hex() for key in KEYS} for line in lines]


def versions() -> dict[str, str]:
    """What computes the curve beside this project."""
    return {"machine": platform.machine()} | {
        name: version(name) for name in ("torch", "megatron-core", "numpy", "pillow")
    }


def test_the_loss_curve_has_not_moved(tmp_path: Path) -> None:
    golden = json.loads(FILE.read_text())
    found = curve(tmp_path)
    assert len(found) == len(golden["curve"]) == STEPS
    if versions() == golden["versions"]:
        assert found == golden["curve"]
        return
    for mine, theirs in zip(found, golden["curve"], strict=True):  # other software may add in another order
        assert [float.fromhex(mine[key]) for key in KEYS] == pytest.approx(
            [float.fromhex(theirs[key]) for key in KEYS], rel=1e-4
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps({"versions": versions(), "curve": curve(Path(folder))}, indent=1) + "\n")

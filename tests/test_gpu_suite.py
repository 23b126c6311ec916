"""The GPU suite, run as a toy in Triton's interpreter: what it writes, what it refuses, and that it sees errors."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "tools" / "gpu_suite.py"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PLANT = """
import sys
sys.path.insert(0, {tools!r})
from megabagel_kernels.swiglu import triton
right = triton.swiglu
triton.swiglu = lambda x: right(x) * 1.01
import gpu_suite
sys.exit(gpu_suite.main(sys.argv[1:]))
"""
"""The suite with a SwiGLU that is one percent off."""


def run(folder: Path, *options: str, program: tuple[str, ...] = (str(SUITE),)) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and Markdown of a toy run."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, *program, "--toy", "--out", str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    written = sorted(folder.glob("gpu_suite_*"))
    assert [path.suffix for path in written] == [".json", ".md"], done.stdout[-3000:] + done.stderr[-3000:]
    return done.returncode, json.loads(written[0].read_text()), written[1].read_text()


@needs_triton
def test_quick_parts_leave_a_report(tmp_path: Path) -> None:
    code, found, markdown = run(tmp_path, "--only", "ceilings", "memory", "liger")
    assert (code, found["failures"], found["left_out"]) == (0, [], [])
    assert set(found) == {"environment", "parts", "failures", "left_out", "seconds"}
    assert set(found["environment"]) == {"date", "commit", "python", "torch", "triton", "cuda", "device", "timings"}
    assert found["environment"]["timings"].startswith("meaningless")
    assert list(found["parts"]) == ["ceilings", "memory", "liger"]
    assert set(found["parts"]["ceilings"]) == {"gemm", "copy", "unmasked attention"}
    assert set(found["parts"]["memory"]["SwiGLU"]) == {"forward_ms", "backward_ms", "seconds"}  # and no rates
    assert "forward_ms" in found["parts"]["liger"]["linear + cross-entropy: ours"]
    if importlib.util.find_spec("liger_kernel") is None:
        assert "pip install liger-kernel" in found["parts"]["liger"]["SwiGLU: Liger"]["absent"]
    assert "| SwiGLU |" in markdown
    assert "- timings: meaningless" in markdown


@needs_triton
@pytest.mark.thorough
def test_a_wrong_kernel_fails_and_is_not_timed(tmp_path: Path) -> None:
    program = ("-c", PLANT.format(tools=str(SUITE.parent)))
    code, found, markdown = run(tmp_path, "--only", "check-others", "memory", program=program)
    assert code == 1
    assert found["failures"] == [f"check-others: SwiGLU {dtype}: wrong result" for dtype in ("bfloat16", "float32")]
    assert found["parts"]["memory"]["SwiGLU"] == {"skipped": "swiglu gave wrong results"}
    assert "forward_ms" in found["parts"]["memory"]["norm"]
    assert "- check-others: SwiGLU bfloat16: wrong result" in markdown


@needs_triton
def test_without_time_the_report_says_what_is_missing(tmp_path: Path) -> None:
    code, found, markdown = run(tmp_path, "--only", "ceilings", "layer", "--minutes", "0")
    assert (code, found["parts"], found["failures"]) == (0, {}, [])
    assert found["left_out"][:2] == ["ceilings: gemm", "ceilings: copy"]
    assert len(found["left_out"]) == 5
    assert "- ceilings: gemm" in markdown


@pytest.mark.slow
@needs_triton
def test_the_whole_suite_as_a_toy(tmp_path: Path) -> None:
    code, found, _ = run(tmp_path)
    assert (code, found["failures"], found["left_out"]) == (0, [], [])
    parts = ["ceilings", "check-attention", "check-others", "configurations", "attention", "memory", "liger", "layer"]
    assert list(found["parts"]) == parts
    assert len(found["parts"]["check-attention"]) == 13
    assert all(check["right"] for part in parts[1:3] for check in found["parts"][part].values())
    rivals = {name.partition(": ")[2]: result for name, result in found["parts"]["attention"].items()}
    assert list(rivals) == ["ours", "flex, our lists", "flex as BAGEL", "SDPA by sample"]
    assert all(rivals[name]["differs"] < 0.01 for name in list(rivals)[1:])  # all compute the same thing


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "torch finds no GPU; --toy runs all parts" in done.stderr
    assert not list(tmp_path.iterdir())

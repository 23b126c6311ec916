"""Runs the tests of the flow, norm, rotary, SwiGLU and cross-entropy kernels in Triton's interpreter, in one process.

Triton reads TRITON_INTERPRET when it is imported, and interpreted and compiled kernels do not mix. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/interpreted_glue.py
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = ["interpreted_flow.py", "interpreted_glue.py", "interpreted_cross_entropy.py", "interpreted_ops.py"]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_in_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / file) for file in FILES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes any tensor")
def test_compiled_kernels_refuse_a_cpu():
    from megabagel_kernels.glue_triton_swiglu import swiglu

    with pytest.raises(ValueError, match=r"run on cuda, the arguments lie on cpu: use the torch reference there"):
        swiglu(torch.zeros(2, 8))

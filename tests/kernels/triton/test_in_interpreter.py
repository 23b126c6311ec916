"""Runs the tests of kernel values in Triton's interpreter, in processes of their own.

Triton decides when it is imported whether its functions compile or are interpreted. Another test of this process may
have imported it already, and the variable would reach every process that a later test starts; so it is set for one
child only. By hand:

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
OTHERS = tuple(f"interpreted_{name}.py" for name in ("flow", "glue", "cross_entropy", "ops", "model"))

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("files", [("interpreted_attention.py",), OTHERS], ids=["attention", "the others"])
def test_kernel_values(files: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / file) for file in files)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes any tensor")
def test_compiled_kernels_refuse_a_cpu() -> None:
    from megabagel_kernels.glue_triton_swiglu import swiglu

    with pytest.raises(ValueError, match=r"run on cuda, the arguments lie on cpu: use the torch reference there"):
        swiglu(torch.zeros(2, 8))

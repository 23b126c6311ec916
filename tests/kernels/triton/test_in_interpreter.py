"""Run the `interpreted*.py` tests of kernel values in Triton's interpreter, in processes of their own.

Triton decides when it is imported whether its functions compile or are interpreted. Another test of this process may
have imported it already, and the variable would reach every process that a later test starts; so it is set for one
child only. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/rms_norm/interpreted.py
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[1]
ATTENTION = (KERNELS / "attention" / "interpreted.py",)
OTHERS = tuple(file for file in sorted(KERNELS.glob("*/interpreted*.py")) if file not in ATTENTION)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("files", [ATTENTION, OTHERS], ids=["attention", "the others"])
def test_kernel_values(files: tuple[Path, ...]) -> None:
    interpreted(files, "not thorough")


@needs_triton
@pytest.mark.thorough
@pytest.mark.parametrize("files", [ATTENTION, OTHERS], ids=["attention", "the others"])
def test_more_kernel_values(files: tuple[Path, ...]) -> None:
    interpreted(files, "thorough")


def interpreted(files: tuple[Path, ...], marked: str) -> None:
    """Run the tests of some files in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, *map(str, files)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=KERNELS.parents[1], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes any tensor")
def test_compiled_kernels_refuse_a_cpu() -> None:
    from megabagel_kernels.swiglu import swiglu

    with pytest.raises(ValueError, match=r"run on cuda, the arguments are on cpu: use the torch engine there"):
        swiglu(torch.zeros(2, 8), engine="triton")

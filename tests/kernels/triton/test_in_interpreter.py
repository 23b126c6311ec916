"""Runs the tests of kernel values in a process of their own.

Triton decides when it is imported whether its functions compile or are interpreted. Another test of this process may
have imported it already, and the variable would reach every process that a later test starts; so it is set for one
child only.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernel_values_in_the_interpreter():
    tests = Path(__file__).with_name("interpreted_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

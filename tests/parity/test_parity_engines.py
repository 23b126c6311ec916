"""The golden cases with every attention engine, and all kernels, that run without a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support.parity_command import DP2, TRAIN, TRAIN_AT_HAND, parity, paths
from tests.support.parity_files import needs
from tests.support.rank_pool import RankPool

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def test_flex_forward(ranks: RankPool) -> None:
    """torch has no backward for it on a CPU, and the command says so."""
    outcome = ranks.run(1, parity, [*paths(*TRAIN_AT_HAND), "parallel.attention=flex"])[0]
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.out.count("no gradients: attention engine flex has no backward here") == len(TRAIN_AT_HAND)
    assert "grad/" not in outcome.out


@needs_triton
@needs("train_02_t2i", "train_05_interleave3")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="alone"),
        pytest.param(("parallel.cp=2", "--nproc", "2"), id="cp 2", marks=pytest.mark.thorough),
    ],
)
def test_triton_in_the_interpreter(options: tuple[str, ...]) -> None:
    passes_interpreted("train_02_t2i", "train_05_interleave3", options=("parallel.attention=triton", *options))


SPLIT_VOCABULARY = "parallel.tp=2", "parallel.sp=false", "--nproc", "2"


@needs_triton
@pytest.mark.parametrize(
    ("cases", "options"),
    [
        (("train_03_vlm",), ()),
        pytest.param(TRAIN, (), marks=pytest.mark.thorough),
        pytest.param(("train_03_vlm",), ("parallel.tp=2", "--nproc", "2"), marks=pytest.mark.slow),
        pytest.param(("train_03_vlm",), SPLIT_VOCABULARY, marks=pytest.mark.thorough),
        pytest.param(
            ("train_02_t2i",), ("parallel.pp=2", "parallel.recompute=full", "--nproc", "2"), marks=pytest.mark.thorough
        ),
    ],
    ids=["alone", "all", "tp 2 sp", "tp 2", "pp 2"],
)
def test_kernels_between_the_linears(cases: tuple[str, ...], options: tuple[str, ...]) -> None:
    """Norms, rotation, SwiGLU, flow loss and word loss in Triton, with a whole and with a split vocabulary."""
    passes_interpreted(*cases, options=("parallel.kernels=triton", *options))


def passes_interpreted(*cases: str, options: tuple[str, ...]) -> None:
    """In processes of their own: Triton decides at its import whether it interprets."""
    words = [*paths(*cases), *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megabagel", "parity", *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("rows ok") == len(cases) and done.stdout.count("grad/") > 10 * len(cases)


@needs(DP2)
def test_a_trace_needs_gradients(ranks: RankPool) -> None:
    outcome = ranks.run(1, parity, [*paths(DP2), "parallel.attention=flex"])[0]
    assert outcome.code == 2
    assert "a trace trains, but attention engine flex has no backward here" in outcome.err

"""Engine dali on a CPU against the reference. The corpus runs in a process of its own: what aborts there fails here."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megabagel.data.decode import Request
from megabagel.data.decode.dali import DaliEngine, resample_floats
from megabagel.data.decode.host import HostEngine, resample
from tests.support.bad_images import DOCUMENT, FILES, MARKERS, smooth, table
from tests.support.pictures import file_of, noise

pytest.importorskip("nvidia.dali")

MOST, MEAN = 2, 0.02
"""Tolerance of dali against host, in levels of 255: of any pixel, and of an image on average."""
SIZES = [(512, 512), (28, 42), (259, 200), (700, 476), (364, 700), (517, 510)]


@pytest.fixture(scope="module")
def corpus() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.bad_images", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_corpus_is_large() -> None:
    assert len(FILES) >= 100


def test_both_engines_meet_the_same_outcome_on_every_file(corpus: dict[str, Any]) -> None:
    for name, row in corpus["files"].items():
        assert row["host"] == row["dali"], name
        assert all(level <= MOST for level in row.get("levels", [])), name
        if row["by"] != "DALI":
            assert not any(row.get("levels", [])), name


def test_a_verified_image_decodes_and_no_other(corpus: dict[str, Any]) -> None:
    for name, row in corpus["files"].items():
        full, quick = row["measured"]
        assert full == row["host"] or "levels" in row, name
        assert quick == full or full == "damaged image", name


def test_neighbours_do_not_matter(corpus: dict[str, Any]) -> None:
    assert len(corpus["together"]) == len(FILES) and all(corpus["together"])


def test_the_document_shows_the_outcomes(corpus: dict[str, Any]) -> None:
    shown = DOCUMENT.read_text().partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    assert shown == table(corpus["files"]), "python -m tests.support.bad_images writes the table"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("make", [noise, smooth])
def test_agreement_with_the_reference(format: str, make: Any) -> None:
    requests = [Request(file_of(make(510, 517, seed=seed), format), tuple(SIZES)) for seed in range(2)]
    engine = DaliEngine()
    for ours, theirs in zip(engine(requests), HostEngine()(requests), strict=True):
        assert isinstance(ours, list) and isinstance(theirs, list)
        for size, mine, reference in zip(SIZES, ours, theirs, strict=True):
            off = (mine - reference).abs() * 127.5
            assert mine.shape == (3, *size) and off.max() < MOST + 0.1 and off.mean() < MEAN, size
            assert size != (517, 510) or torch.equal(mine, reference), "an image at its own size is exact"
    assert not engine.by_host, "decoded by DALI"


@pytest.mark.parametrize("size", SIZES)
def test_what_a_gpu_computes_agrees_too(size: tuple[int, int]) -> None:
    """The same function in float32 on the CPU; GPUs have no resampling of bytes."""
    for image in (noise(510, 517), smooth(510, 517)):
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        reference = torch.from_numpy(np.array(resample(image, *size))).permute(2, 0, 1)
        off = (resample_floats(levels, size) - reference).abs()
        assert off.max() <= MOST and off.mean() < MEAN


def test_what_goes_to_the_host_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    clear = Request(file_of(noise(9, 7, "RGBA")), ((28, 42),))
    engine = DaliEngine()
    with caplog.at_level(logging.INFO):
        engine([clear, Request(file_of(noise(9, 7)), ((28, 42),)), clear])
        engine([clear])
    assert engine.by_host == {"PNG of mode RGBA": 3}
    assert len(caplog.messages) == 1 and "PNG of mode RGBA goes to engine host" in caplog.messages[0]


def test_threads_change_nothing() -> None:
    requests = [Request(file_of(smooth(80 + seed, 60, seed=seed), "JPEG"), ((64, 96),)) for seed in range(20)]
    one, two = DaliEngine()(requests), DaliEngine(threads=2)(requests)
    assert all(isinstance(a, list) and torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


def test_no_request_gives_no_outcome() -> None:
    assert DaliEngine()([]) == HostEngine()([]) == HostEngine(2)([]) == []


@pytest.mark.thorough
def test_the_benchmark_runs(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "benchmarks/decode.py", "--images", "1", "--rounds", "1", "--out", tmp_path]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert len(rows) == 12 and all(row["per_cpu_second"] > 0 for row in rows)
    assert (tmp_path / "decode.md").read_text().count("| dali |") == 4

"""Golden numbers of the official BAGEL code, where they are at hand."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

Golden = tuple[dict[str, Tensor], dict]


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """`golden(case)` gives the tensors and the JSON of a parity case; skips the test where the folder is absent."""
    beside = Path(__file__).parents[2] / "shared" / "parity"
    folder = Path(os.environ.get("MEGABAGEL_PARITY_DIR", beside))

    def load(case: str) -> Golden:
        if not folder.is_dir():
            pytest.skip(f"no golden files at {folder}; MEGABAGEL_PARITY_DIR names their folder")
        return load_file(folder / f"{case}.safetensors"), json.loads((folder / f"{case}.json").read_text())

    return load

"""Golden numbers of the official BAGEL code, where they are at hand."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

Golden = tuple[dict[str, Tensor], dict]


FOLDER = Path(os.environ.get("MEGABAGEL_PARITY_DIR", Path(__file__).parents[2] / "shared" / "parity"))
"""Where the cases lie; they are not part of this repository."""


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """`golden(case)` gives the tensors and the JSON of a parity case; skips the test where the folder is absent."""

    def load(case: str) -> Golden:
        if not FOLDER.is_dir():
            pytest.skip(f"no golden files at {FOLDER}; MEGABAGEL_PARITY_DIR names their folder")
        return load_file(FOLDER / f"{case}.safetensors"), json.loads((FOLDER / f"{case}.json").read_text())

    return load

"""Golden numbers of the official BAGEL code: three cases in the repository, more where a folder with them is at hand.

A test of a case that is absent is not collected (see `tests/conftest.py`); one test is skipped and names the folder.
Which cases a test needs is read off its parameters, or declared by `@needs("train_04_edit")`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

Golden = tuple[dict[str, Tensor], dict]

INSIDE = Path(__file__).parents[1] / "parity" / "golden"
OUTSIDE = Path(os.environ.get("MEGABAGEL_PARITY_DIR", Path(__file__).parents[3] / "shared" / "parity"))
"""Where the other cases lie; they are not part of this repository."""

CASE = re.compile(r"(train|trace|prim|infer|srum)_\d\d\w*")

needs = pytest.mark.golden
"""`@needs("train_04_edit", ...)`: collect the test only where these cases are at hand."""


def stem(case: str) -> Path:
    """Path of a case without suffix, in whichever folder has it."""
    return (INSIDE if (INSIDE / f"{case}.json").is_file() else OUTSIDE) / case


def at_hand(*cases: str) -> tuple[str, ...]:
    """Those of `cases` whose files exist."""
    return tuple(case for case in cases if stem(case).with_suffix(".json").is_file())


def all_cases() -> list[str]:
    """Names of all cases at hand."""
    return sorted({path.stem for folder in (INSIDE, OUTSIDE) for path in folder.glob("*.safetensors")})


def cases_of(item: pytest.Item) -> Iterator[str]:
    """Cases that a test needs: declared ones, and those named by a parameter."""
    for mark in item.iter_markers("golden"):
        yield from mark.args
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        yield from _named(value)


def _named(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield from [value] if CASE.fullmatch(value) else []
    elif isinstance(value, tuple | list | set | frozenset):
        yield from (case for part in value if isinstance(part, str) for case in _named(part))


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """`golden(case)` gives the tensors and the JSON of a parity case that is at hand."""

    def load(case: str) -> Golden:
        path = stem(case)
        return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())

    return load

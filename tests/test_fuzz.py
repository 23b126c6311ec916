"""Inputs from outside, made by the thousand from a seed: none crashes, hangs, takes the memory or is misread.

`python -m tests.support.fuzz` prints the same table, and reads a single input again by its number.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megabagel.errors import UserError
from tests.support import fuzz
from tests.support.fuzz import Row, Wrong, mutated_bytes, mutated_json

EACH = 40
"""Inputs of each target in CI: 520 of 13."""
THOROUGH = 400


def faults(rows: dict[str, Row]) -> list[str]:
    return [f"{one.target} {one.number}: {one.kind}: {one.told}" for row in rows.values() for one in row.faults]


def test_inputs_of_every_kind() -> None:
    rows = fuzz.fuzz(EACH)
    assert sum(row.counts.total() for row in rows.values()) >= 500
    assert not faults(rows)
    for name, row in rows.items():
        assert row.counts["refused"] + row.counts["left out"], f"{name}: nothing was wrong with any input"
        assert row.counts["read"] + row.counts["left out"], f"{name}: no input came past the first check"


@pytest.mark.thorough
def test_thousands_of_inputs() -> None:
    rows = fuzz.fuzz(THOROUGH, seed=1)
    assert sum(row.counts.total() for row in rows.values()) >= 5000
    assert not faults(rows)


# The harness sees what it is there for.


def prepare(folder: Path) -> None:
    """Nothing to make."""


def _raise(error: BaseException) -> str:
    raise error


def _allocate(rng: random.Random, folder: Path) -> str:
    return "read" if len(b"x" * (600 << 20)) else ""


def _hang(rng: random.Random, folder: Path) -> str:
    while True:
        pass


def _die(rng: random.Random, folder: Path) -> str:
    import ctypes

    ctypes.string_at(0)
    return "read"


TARGETS: dict[str, Callable[[random.Random, Path], str]] = {
    "read": lambda rng, folder: "read",
    "refused": lambda rng, folder: _raise(UserError("no")),
    "crash": lambda rng, folder: _raise(ZeroDivisionError("planted")),
    "memory": _allocate,
    "wrong": lambda rng, folder: _raise(Wrong("planted")),
    "hang": _hang,
    "death": _die,
    "after": lambda rng, folder: "left out",
}


def test_faults_are_seen() -> None:
    rows = fuzz.fuzz(1, module=__name__, seconds=2)
    found = {name: next(iter(row.counts)) for name, row in rows.items()}
    assert found == {**{name: name for name in TARGETS}, "death": "crash", "after": "left out"}
    assert "ended with -11" in rows["death"].faults[0].told and "planted" in rows["crash"].faults[0].told
    assert "| hang | 1 | 0 | 0 | 0 | 0 | 0 | 1 | 0 |" in fuzz.table(rows)


def test_an_input_follows_from_its_number() -> None:
    made = [mutated_bytes(random.Random("0/x/7"), bytes(range(99)), 3) for _ in range(2)]
    assert made[0] == made[1] != bytes(range(99))
    value = {"a": [1, 2.5, {"b": None}], "c": "text"}
    changed = [repr(mutated_json(random.Random(str(seed)), value)) for seed in range(50)]
    assert len(set(changed)) > 25 and value == {"a": [1, 2.5, {"b": None}], "c": "text"}


def test_the_table_replaces_the_rows_of_its_targets() -> None:
    row = Row()
    row.counts.update(["read", "refused"])
    text = f"before\n{fuzz.START}{fuzz.table({'a': Row(), 'b': Row()})}{fuzz.END}after\n"
    new = fuzz._write(text, {"b": row})
    assert new == f"before\n{fuzz.START}{fuzz.table({'a': Row(), 'b': row})}{fuzz.END}after\n"

"""The golden cases themselves: which are in the repository, how large they are, and whether the others are at hand."""

import json

import pytest

from tests.support.parity_files import INSIDE, OUTSIDE, at_hand, cases_of, needs, stem

IN_THE_REPOSITORY = ("infer_08_text_turns", "prim_01_building_blocks", "train_01_text_only")
MOST_BYTES = 2_000_000


def test_three_cases_are_in_the_repository() -> None:
    files = [path for path in INSIDE.iterdir() if path.name != "README.md"]
    assert sorted({path.stem for path in files}) == list(IN_THE_REPOSITORY) and len(files) == 6
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    readme = (INSIDE / "README.md").read_text()
    for case in IN_THE_REPOSITORY:
        assert stem(case).parent == INSIDE and f"| `{case}` |" in readme
        assert json.loads(stem(case).with_suffix(".json").read_text())["case"] == case


def test_the_other_cases_are_at_hand() -> None:
    """The one skip that tells of their absence."""
    if not OUTSIDE.is_dir():
        pytest.skip(f"{OUTSIDE}: no such folder; tests of the golden cases outside the repository are not collected")
    assert at_hand("train_04_edit", "trace_01_dp2", "prim_02_tiny_vae")


@needs("train_01_text_only")
@pytest.mark.parametrize("row, cases", [("train_loss", ("prim_01_building_blocks", "expect/ce"))])
def test_which_cases_a_test_needs(request: pytest.FixtureRequest, row: str, cases: tuple[str, ...]) -> None:
    assert set(cases_of(request.node)) == {"train_01_text_only", "prim_01_building_blocks"}

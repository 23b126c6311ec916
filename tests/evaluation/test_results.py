"""Intervals, emergence, charts and the report against numbers worked out by hand."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megabagel.errors import UserError
from megabagel.evaluation.charts import line_chart, markdown_table
from megabagel.evaluation.checkpoints import Seen, checkpoints, seen
from megabagel.evaluation.emergence import abilities, write_emergence
from megabagel.evaluation.intervals import mean, paired, proportion, student95
from megabagel.evaluation.published import FIGURES
from megabagel.evaluation.report import section, write_report
from megabagel.evaluation.suite import average
from megabagel.evaluation.suites.registry import SUITES


def test_wilson() -> None:
    # Wilson (1927); the textbook case of 8 of 10: 0.490 to 0.943.
    found = proportion(8, 10)
    assert found is not None and (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    none, every = proportion(0, 20), proportion(20, 20)
    assert none is not None and every is not None and proportion(0, 0) is None
    assert none.low == 0 and none.high == pytest.approx(0.1611, abs=1e-4) == 1 - every.low


def test_student() -> None:
    assert [round(student95(freedom), 3) for freedom in (1, 2, 10, 11, 30, 10**6)] == [
        12.706, 4.303, 2.228, 2.201, 2.042, 1.960,
    ]  # fmt: skip
    found = mean([1.0, 2.0, 4.0])
    half = 4.303 * math.sqrt((16 + 1 + 25) / 9 / 2) / math.sqrt(3)
    assert found is not None and found.value == pytest.approx(7 / 3) and found.high - found.value == pytest.approx(half)
    difference = paired([1.0, 5.0], [1.5, 5.7])
    assert difference is not None and difference.value == pytest.approx(0.6)
    assert mean([]) is None and mean([1, 0, 1]) == proportion(2, 3)


def test_average_of_groups() -> None:
    first, second = mean([0.0, 1.0, 2.0]), mean([4.0, 6.0])
    both = average([first, second, None])
    assert both is not None and both.value == 3 and first is not None and second is not None
    assert both.high - 3 == pytest.approx(math.hypot(first.high - 1, second.high - 5) / 2)


def test_chart_and_table() -> None:
    picture = Image.open(io.BytesIO(line_chart({"a": [(0, 1), (1e6, 2)], "b": [(5, math.nan)]}, "t", "x", "y")))
    assert picture.size == (860, 460) and len(set(picture.get_flattened_data())) > 5
    line_chart({}, "nothing", "x", "y")
    assert markdown_table(("a", "b"), [("x|y", 1)]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"


def summary(**scores: float) -> dict[str, Any]:
    made = {name: {"value": v, "low": v - 0.1, "high": v + 0.1, "count": 9, "scale": 1.0} for name, v in scores.items()}
    return {"suite": "shapes", "scores": made, "scored": 9, "outputs": 10, "judge": {"judge": "exact"}}


def test_tokens_to_85_percent_of_the_peak(tmp_path: Path) -> None:
    trained = [Seen(100, 1000, 5), Seen(200, 2000, 5), Seen(300, 3000, 5)]
    runs = [
        summary(ask=0.2, draw=0.0, edit=0.0),
        summary(ask=0.7, draw=0.1, edit=0.0),
        summary(ask=0.8, draw=0.4, edit=0.0),
    ]
    axis, found = abilities(runs, trained, ("ask", "draw", "edit", "absent"))
    # 85 % of 0.8 is 0.68, of 0.4 is 0.34.
    assert axis == "tokens" and [(a.name, a.peak, a.reached) for a in found] == [
        ("ask", 0.8, 2000), ("draw", 0.4, 3000), ("edit", 0.0, None),
    ]  # fmt: skip
    text = write_emergence(tmp_path, runs, trained, ("draw", "ask"))
    assert text.index("| ask | 0.800 | 2,000 | 0.800 |") < text.index("| draw | 0.400 | 3,000 | 0.400 |")
    assert "| 200 | 2,000 | 0.100 | 0.700 |" in text
    assert (tmp_path / "emergence.png").is_file() and list((tmp_path / "tensorboard").iterdir())
    assert abilities(runs, [Seen(1, None, None), *trained[1:]], ())[0] == "steps"


def test_tokens_of_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_00000002"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoints(tmp_path, True)
    (folder / "manifest.json").touch()
    lines = [{"step": n, "tokens": 10 * n, "tokens_gen": n} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert checkpoints(tmp_path, False) == checkpoints(tmp_path, True) == [folder]
    assert seen(folder) == Seen(2, 30, 3)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[1]) + "\n")
    assert seen(folder) == Seen(2, None, None)


def evaluation(folder: Path, **scores: float) -> Path:
    """What an evaluation with one picture leaves."""
    (folder / "outputs").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "outputs" / "a.png")
    (folder / "generated.0-of-1.jsonl").write_text(json.dumps({"id": "a", "sample": 0, "file": "a.png"}) + "\n")
    (folder / "summary.json").write_text(json.dumps({**summary(**scores), "suite": "geneval"}))
    return folder


def test_report(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / name, overall=value) for name, value in (("mine", 0.5), ("yours", 0.6))]
    text = write_report(folders, tmp_path)
    assert "| overall | 0.500 (0.400-0.600) | 0.600 (0.500-0.700) | 0.82 | 0.88 |" in text
    assert "BAGEL, arXiv:2505.14683" in text and "9 of 10" in text
    assert Image.open(tmp_path / "report.png").size[0] == 256
    with pytest.raises(UserError, match="holds no result of a suite"):
        write_report([tmp_path / "gone"], tmp_path)
    assert section("shapes", []).startswith("## shapes")


def test_published_numbers_have_a_place() -> None:
    assert {figure.suite for figure in FIGURES} <= SUITES.keys()
    assert len({figure[:3] for figure in FIGURES}) == len(FIGURES)
    row = [f.value for f in FIGURES if (f.model, f.suite) == ("BAGEL", "t2i-compbench")]
    assert sum(row[:-1]) / 8 == pytest.approx(row[-1], abs=0.005)
    wise = [f.value for f in FIGURES if (f.model, f.suite) == ("BAGEL", "wise")]
    assert round(sum(wise[:6]) / 6, 2) == wise[6]
